"""Benchmarks of every hot path against PyTorch and peers: `python bench.py COMMAND [--json FILE]`.

Commands: train, data, sample, serve, kernels, checkpoint, gpu; each is a file of benchmarks/. Each prints the setting
it ran in and a table, and with --json writes the same. Contenders take turns within a repeat; a figure is the median of
the repeats, and a ratio is taken within each repeat, so that the machine's drift cancels. Peers run as they are, in
processes of their own; none of their code is here, and nothing of theirs is unpickled. One that fails is left out.
"""

import cli
from benchmarks import checkpoint, data, gpu, kernels, measure, sample, serve, train
from config import exit_cleanly


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python bench.py", description="Benchmarks against PyTorch and peers: a table, and JSON.",
                        allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, data, sample, serve, kernels, checkpoint, gpu):
        command.add_to(commands)
    measure.report(argv, parser.parse_args(argv))


if __name__ == "__main__":
    exit_cleanly(main)
