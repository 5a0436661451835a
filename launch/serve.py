"""A live stream in a browser: click a garment, see it change.

    python -m launch.serve                                  # the embedded model, on this machine
    python -m launch.serve --weights runs/dmd/export --wardrobe shop/ --max_sessions 2
    python -m launch.serve --host 0.0.0.0 --allow_host shop.example   # behind a proxy with TLS

Prints the address of the page, with the token in it that clients need. A wardrobe is a folder with
`people/` and `garments/`, pictures in PNG, JPEG or WebP whose names are their titles; without one
the examples of the project are shown. Needs the extra `serve`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from chameleon_jax import places
from chameleon_jax.errors import ROOT, need
from launch import cli, jobs
from launch.cli import UsageError

CONFIG = "configs/runway_tiny.py"
EXAMPLES = ROOT / "chameleon_jax" / "assets" / "examples"
EVERYWHERE = ("0.0.0.0", "::")  # addresses that stand for all of this machine
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SILENT = 90  # seconds after which a connection that takes nothing is closed by the system
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
KINDS = {"people": "person", "garments": "garment"}  # folders of a wardrobe


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag((CONFIG, ""), others=["configs/wan22_5b.py"])
    parser.flag(
        "weights",
        "folder of weights, name on the Hugging Face Hub, or random; default that of the config",
        metavar="DIR",
    )
    parser.flag("host", "address to listen on", default="127.0.0.1", metavar="HOST")
    parser.flag(
        "port", "port to listen on", kind=cli.whole_number(0, 65535), default=8000, metavar="N"
    )
    parser.flag(
        "allow_host",
        "name under which browsers may reach the server, besides this machine's own; may be"
        " repeated",
        repeated=True,
        metavar="NAME",
    )
    parser.switch("auth", "clients need the token; only this machine may do without", default=True)
    parser.flag("wardrobe", "folder with people/ and garments/", metavar="DIR")
    parser.flag(
        "record", "folder in which the film of every stream is kept; default none", metavar="DIR"
    )
    parser.flag(
        "max_sessions",
        "streams at a time; they share the device",
        kind=cli.whole_number(1, 64),
        default=1,
        metavar="N",
    )
    parser.flag(
        "steps",
        "denoising steps; default that of the config",
        kind=cli.whole_number(1, 1000),
        metavar="N",
    )
    parser.mesh_flag()
    parser.decoder_flag()
    parser.quantize_flag()
    parser.compilation_flag()


def serve(values: cli.Values) -> int:
    """The command. Returns the exit code."""
    for module in ("starlette", "uvicorn", "websockets", "av"):
        need(module, "serve")
    if not values.auth and values.host not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(f"--noauth with --host {values.host}: only this machine may do without")
    from chameleon_jax.inference.pipeline import Pipeline
    from chameleon_jax.serving.app import Limits, make_app
    from chameleon_jax.serving.engine import Engine
    from chameleon_jax.serving.guard import Guard, new_token
    from chameleon_jax.serving.pictures import Wardrobe
    from chameleon_jax.serving.server import Server, settings

    record = None
    if values.record:
        record = Path(values.record)
        places.check_writable(record / "film.mp4")
        record.mkdir(parents=True, exist_ok=True)
    listener = listen(values.host, values.port)  # a port that is taken is to be seen at once
    cli.start_jax(values)
    config = jobs.read_chunked(values, CONFIG, jobs.is_for_streams)
    weights = values.weights or config.weights
    print("loading the model ...", file=sys.stderr)
    mesh = jobs.stream_mesh(values.mesh)
    if weights == "random":
        pipeline = Pipeline.random(config, 0, decoder=values.decoder, mesh=mesh)
    else:
        pipeline = Pipeline.from_pretrained(weights, config, decoder=values.decoder, mesh=mesh)
    wardrobe = Wardrobe(pipeline.size)
    fill(wardrobe, places.find(values.wardrobe) if values.wardrobe else None)
    token = new_token() if values.auth else None
    hosts = [*LOOPBACK, *values.allow_host]
    if values.host not in EVERYWHERE:
        hosts.append(f"[{values.host}]" if ":" in values.host else values.host)
    app = make_app(
        Engine(pipeline),
        wardrobe,
        Guard(token, hosts),
        Limits(sessions=values.max_sessions),
        record,
    )
    host = "127.0.0.1" if values.host in EVERYWHERE else values.host
    host = f"[{host}]" if ":" in host else host
    fragment = f"#token={token}" if token else ""
    print(f"open http://{host}:{listener.getsockname()[1]}/{fragment}", file=sys.stderr, flush=True)
    Server(settings(app, values.max_sessions)).run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket on which clients may connect from now on; they wait until the server is there.

    Raises:
      UsageError: there is no such address here, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); choose"
            " another port, or 0 for a free one"
        ) from None
    # Else one who has stopped reading is only given up after a quarter of an hour.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT)
    return listener


def fill(wardrobe, folder: Path | None) -> None:
    """Put pictures into a wardrobe: those of a folder, or the examples.

    Raises:
      UsageError: the folder has no people, or no garments.
      ImageError: a picture cannot be read.
    """
    if folder is None:
        wardrobe.add_file("person", EXAMPLES / "person.png", "example")
        for name in ("first", "second", "third"):
            wardrobe.add_file("garment", EXAMPLES / f"{name}.png", name)
        return
    for part, kind in KINDS.items():
        found = sorted(
            path for path in (folder / part).glob("*") if path.suffix.lower() in SUFFIXES
        )
        if not found:
            raise UsageError(
                f"--wardrobe {folder}: no pictures in {folder / part}; expected some of"
                f" {', '.join(SUFFIXES)}"
            )
        for path in found:
            wardrobe.add_file(kind, path, path.stem.replace("_", " "))


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.serve") -> None:
    """The command line."""
    cli.main(program, __doc__, define_flags, serve, argv)


if __name__ == "__main__":
    main()
