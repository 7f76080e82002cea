"""`sami-cache demo-web`: a model behind a page on which one clicks."""

import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipelines.demo_web_pictures import Pictures
from pipelines.demo_web_server import DemoServer
from pipelines.promptable import open_promptable
from sami_cache.errors import SamiCacheError, one_line
from sami_cache.processes import choose_device


def demo_web(
    run_or_checkpoint: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_page: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C. `port` 0: any free one. `say` takes what is to be told.

    Raises SamiCacheError where the model cannot be opened or the address cannot be had.
    """
    model = open_promptable(run_or_checkpoint, choose_device(device))
    config = model.config
    about = f"{one_line(run_or_checkpoint.name, 60)} · {config.encoder}, {config.family}, {config.image_size} px"
    try:
        server = DemoServer(Pictures(model), host, port, about)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SamiCacheError(f"cannot listen on {host}, port {port}: {reason}. Choose others by --host and --port.") from error
    with server:
        say(f"{about}: {server.url} (Ctrl-C ends it)")
        if open_page:
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    say("ended.")
