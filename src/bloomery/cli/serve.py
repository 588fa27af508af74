"""`bloomery serve RUN_DIR`: an OpenAI-compatible HTTP server for a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder `train` wrote.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; past the loopback needs --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port (0: any free one).")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token requests must show.")] = None,
    stage: Annotated[str, typer.Option(help="pretrain or an alignment stage (default: the last).")] = "",
) -> None:
    """Serve /v1/models, /v1/completions and /v1/chat/completions, as OpenAI's clients speak them.

    Try it: curl 127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "import "}'
    """
    import sys

    from bloomery.cli.console import require_run, warn

    require_run(run_dir)
    from bloomery.serve.server import address, listen, read_token, serve_forever
    from bloomery.serve.talker import open_talker

    token = read_token(token_file, host)
    listener = listen(host, port)
    talker = open_talker(run_dir, stage)
    warn(talker.skipped)
    url = f"http://{address(host, listener.getsockname()[1])}/v1"
    print(f"{run_dir}: {talker.stage} at {url}; Ctrl-C ends", file=sys.stderr, flush=True)
    serve_forever(talker, listener, token=token)
