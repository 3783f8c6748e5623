"""Show the species of a model in the browser: look for one, see it drawn, compare and share.

    python -m tools.browse --ckpt ADAPTER [--port N] [--no-open]

This machine draws, and the page loads nothing from others. See docs/browse.md.
"""

import argparse
import secrets
import socket
import webbrowser

from runtime.cli import Parser, check_range, run_command
from sampling.options import PRESETS, add_options, check_options

EXAMPLES = """
python -m tools.browse --ckpt results/inat/adapters/0200000.safetensors --images data/inat/val
python -m tools.browse --ckpt examples/glyphs/base.safetensors --vae examples/glyphs/vae --port 8080 --no-open
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line. Raises ValueError for an unknown or malformed flag."""
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument_group("page").add_argument
    add("--host", help="address for other machines, such as 0.0.0.0; if not given, the page is for this machine alone")
    add("--port", type=int, default=8000, help="port of the page, 0 for any free one")
    add("--open", action=argparse.BooleanOptionalAction, default=True, help="open the page in the browser")
    add("--images", help="folder with real images of the classes, to show beside the pictures")
    add("--beside", help="another adapter of the same classes, to compare on the same noise")
    add_options(parser, without=("--preset", "--guide", "--cfg-scales", "--cfg-intervals"))
    parser.set_defaults(**PRESETS["fast"])
    return parser.parse_args()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ValueError if the address cannot be used."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        found = f"{host} port {port} cannot be used ({error.strerror})"
        raise ValueError(f"{found}, expected a free port of this machine: pass another --port.") from None


def main():
    args = parse_args()
    check_options(args)
    check_range(args, port=(0, 65535))
    try:
        from tools.browse.server import build_server
        from tools.browse.studio import Studio
    except ModuleNotFoundError as error:
        raise ValueError(f"No module {error.name}, which the page needs: pip install starlette uvicorn.") from None
    listener = listen(args.host or "127.0.0.1", args.port)
    studio, token = Studio(args), secrets.token_urlsafe(16) if args.host else ""
    server = build_server(studio, token)
    host, port = args.host or "localhost", listener.getsockname()[1]
    address = f"http://{host}:{port}/{token and token + '/'}"
    print(f"{studio.hierarchy.num_classes:,} species at {address} (Ctrl-C ends it)", flush=True)
    if args.open:
        webbrowser.open(address)
    try:
        server.run([listener])
    except KeyboardInterrupt:
        print()
    finally:
        studio.close()


if __name__ == "__main__":
    run_command(main)
