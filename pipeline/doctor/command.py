"""The command `doctor`: its options, and how what was found is shown."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EPILOG = """\
examples
  this host:             python -m pipeline doctor configs/pretrain_hornet_l_in22k_384.yaml
  the hosts of a run:    python -m pipeline doctor CONFIG --hostfile hostfile
  what launchers ask:    python -m pipeline doctor CONFIG --hostfile hostfile --fast --quiet --launching
  for another program:   python -m pipeline doctor CONFIG --hostfile hostfile --json
Run it where you would start the run, in the checkout: every host is asked in the same folder, by the same interpreter.
It writes nothing but small files into output_root, which it removes. Configuration, checkpoints and start weights are
checked by `pretrain --check`, as every launcher does.
exit codes: 0 no failure (there may be warnings), 1 a failure, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    add("overrides", nargs="*", metavar="key=value", help="dotted overrides, values as in YAML")
    add("--hostfile", type=Path, metavar="FILE", help="the hosts of the run, as HOSTFILE; default: this host alone")
    add("--ranks", type=int, metavar="N", help="ranks of the run; default: all slots of the hostfile, or all GPUs here")
    add("--ssh-port", type=int, metavar="PORT", help="of the hosts' ssh")
    add("--fast", action="store_true", help="without the all-reduce, and without what needs torch: seconds")
    add("--quiet", action="store_true", help="print warnings and failures alone, a line each")
    add("--json", action="store_true", help="print all that was found and told as JSON")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")
    add("--launching", action="store_true", help="what ranks of the last launch still hold is no failure: they leave")
    add("--resume", help=argparse.SUPPRESS)  # launchers hand on what the run gets
    add("--print-config", action="store_true", help=argparse.SUPPRESS)


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code. Raises ConfigError, PortError."""
    from pipeline.doctor import report
    from pipeline.doctor.reach import HostError, reached
    from pipeline.ranks.hostfile import HostfileError, read_hostfile
    from pipeline.ranks.ports import read_port

    began = time.monotonic()
    text = os.environ.get("MASTER_PORT", "")
    port = read_port("MASTER_PORT", text) if text else None
    try:
        hosts = read_hostfile(options.hostfile) if options.hostfile else None
        with reached(hosts, options.ssh_port) as agents:
            from pipeline.config.kinds import load_any  # while the hosts begin
            from pipeline.doctor.examine import Examination

            examined = Examination(agents, hosts, port, options.fast)
            config = load_any(options.config, options.overrides)
            with _progress(options.quiet or options.json) as tell:
                examined.run(config, options.ranks, tell)
        findings, reports = examined.findings, examined.reports
    except HostfileError as error:
        what, _, advice = str(error).rpartition("; ")
        findings, reports = [report.Finding("hostfile", "fail", what, advice)], {}
    except HostError as error:
        findings, reports = [report.Finding("hosts", "fail", str(error), error.advice)], {}
    if options.launching:
        findings = [report.passing(each) if each.check in ("run folder", "port") else each for each in findings]
    seconds = time.monotonic() - began
    if options.json:
        print(report.as_json(findings, reports, seconds))
    elif options.quiet:
        for line in report.lines(findings):
            print(line, file=sys.stderr)
    else:
        where = f"the hosts of {options.hostfile}" if options.hostfile else "this host"
        report.print_table(findings, f"{options.config} on {where}", seconds)
    return 1 if report.failed(findings) else 0


@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[str], None]]:
    """Says what is going on, on a terminal."""
    if silent or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
