"""Is this machine or cluster fit to train? Facts from every host, judged by pure functions, in one table."""
