"""The ``fastmeta`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmeta._version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``fastmeta`` command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 after an error, which stands on stderr in one line.

    Example:
        >>> main(["info"])
        fastmeta ...
        0
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
    _add_demo(commands)
    _add_info(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "say which backend each op runs on here, and why"
    info = commands.add_parser("info", help=text, description=text[0].upper() + text[1:] + ".")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    info.set_defaults(run=_info)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train two learners on printed characters and test them on handwriting",
        description="Meta-train a Matching Network and a MAML learner on characters rendered from "
        "fonts, no digit among them, then test both on characters held out and on handwritten "
        "digits, beside nearest neighbour on raw pixels. Some three minutes on two cores. MNIST is "
        "tested too where the folder that FASTMETA_DATA names has its files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything that is random")
    demo.add_argument(
        "--seconds", type=float, default=150, help="most time to train for, both learners together"
    )
    demo.add_argument("--quick", action="store_true", help="only see that everything runs")
    demo.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    demo.add_argument("--out", type=Path, default=Path("report.html"), help="the report")
    demo.add_argument("--picture", type=Path, help="a picture of the results, .png or .svg")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from fastmeta.demo import format_table, run_demo
    from fastmeta.demo_report import check_picture, demo_page, demo_picture

    # Now, and not after minutes of training.
    if arguments.picture is not None:
        check_picture(arguments.picture)
    for path in filter(None, (arguments.out, arguments.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError(f"cannot write {path}")
    demo = run_demo(
        seed=arguments.seed,
        seconds=arguments.seconds,
        quick=arguments.quick,
        threads=arguments.threads,
        quiet=arguments.quiet,
    )
    sys.stdout.write(f"\n{format_table(demo)}\n\n")
    written = [demo_page(demo).write(arguments.out)]
    if arguments.picture is not None:
        written.append(demo_picture(demo, arguments.picture))
    names = " and ".join(str(path) for path in written)
    sys.stdout.write(f"{demo.seconds['total']:.0f} s in all; wrote {names}\n")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fastmeta.info import backend_info, format_info

    info = backend_info()
    text = json.dumps(info, indent=2) if arguments.json else format_info(info)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
