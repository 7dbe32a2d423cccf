"""The ``fastmeta`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from fastmeta._version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``fastmeta`` command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 after an error, which stands on stderr in one line.

    Example:
        >>> main(["info", "--json"])  # doctest: +SKIP
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"fastmeta {arguments.command}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\nfastmeta {arguments.command}: stopped\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastmeta",
        description="Few-shot and meta-learning for PyTorch: Matching Networks and MAML.",
        epilog="`fastmeta COMMAND --help` tells what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"fastmeta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "say which backend each op runs on here, and why"
    info = commands.add_parser("info", help=text, description=text[0].upper() + text[1:] + ".")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    info.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from fastmeta.info import backend_info, format_info

    info = backend_info()
    text = json.dumps(info, indent=2) if arguments.json else format_info(info)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
