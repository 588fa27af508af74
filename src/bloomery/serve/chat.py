"""A conversation at the terminal. Turns that no longer fit the context are forgotten, oldest first, and said so."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bloomery.model.generate import Sampling
from bloomery.serve.talker import Answer, Talker
from bloomery.spec.errors import InputError


class Conversation:
    """The turns so far and the model that answers them. `forgotten`: turns the last answer made no use of."""

    def __init__(self, talker: Talker, *, max_new: int, sampling: Sampling) -> None:
        self.talker, self.max_new, self.sampling = talker, max_new, sampling
        self.turns: list[tuple[str, str]] = []
        self.forgotten = 0

    def say(self, text: str, show: Callable[[str], None]) -> Answer:
        """Add a user's turn and draw the answer, shown as it comes.

        Raises InputError, and leaves the turns as they were, when it alone is too long. Old turns are forgotten for
        half of the context's worth of answer at most, however long one may be.
        """
        turns = [*self.turns, ("user", text)]
        ids = self.talker.chat_ids(turns)
        context = self.talker.context
        room = context - min(self.max_new, context // 2)
        while len(ids) > room and len(turns) > 1:
            turns = turns[2:]
            ids = self.talker.chat_ids(turns)
        if len(ids) >= context:
            accepted = f"fewer than {context} tokens"
            raise InputError("the message does not fit the model's context", found=len(ids), accepted=accepted)
        self.forgotten, self.turns = len(self.turns) + 1 - len(turns), turns
        answer = Answer()
        for piece in self.talker.talk(ids, answer, max_new=self.max_new, sampling=self.sampling):
            show(piece)
        self.turns.append(("assistant", answer.text))
        return answer


def converse(conversation: Conversation, lines: Iterable[str], show: Callable[[str], None]) -> None:
    """Answer line after line; `/new` forgets everything, `/quit` ends."""
    for line in lines:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if text == "/new":
            conversation.turns.clear()
            continue
        if text:
            try:
                conversation.say(text, show)
                if conversation.forgotten:
                    show(f"\n({conversation.forgotten} old turns no longer fit the model's context and are forgotten)")
            except InputError as error:
                show(f"({error})")
            show("\n")
