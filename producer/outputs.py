"""The files that a run makes: checked before it starts, put in place when it is done."""

from __future__ import annotations

from pathlib import Path

from loramill.producer.options import RunOptions
from loramill.producer.targets import check_target, refuse_clashes
from loramill.producer.targets import refuse_existing as refuse
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.files import atomic_writer, remove_file
from loramill.store.journal import Journal


def check_outputs(options: RunOptions) -> None:
    """Raises Failure: USAGE for names that clash or files in the way, MACHINE for a folder that cannot be written."""
    if str(options.output) == "-":
        raise Failure(ExitCode.USAGE, "-o -: the output must be a file, its finished rows are kept beside it")
    files = {"--output": options.output, "--errors": options.errors_path, "the journal": options.journal_path}
    if options.devices:
        files["the queue"] = options.queue_path
    if options.input != "-":
        files = {"--input": Path(options.input)} | files
    refuse_clashes(files)
    for flag in ("--output", "--errors"):
        check_target(flag, files[flag])
    if not options.journal_path.exists():
        refuse_existing(options)


def refuse_existing(options: RunOptions) -> None:
    """Raises Failure (USAGE) if a result file is there already and may not be replaced."""
    refuse((options.output, options.errors_path), overwrite=options.overwrite)


def publish(journal: Journal, options: RunOptions) -> None:
    """Puts the error file and then the output in place, each whole, and removes the journal.

    A run killed in here is finished by the same command: the journal is there until both files are. Raises StoreError.
    """
    if journal.totals().failed:
        _assemble(journal, options.errors_path, failed=True)
    else:
        remove_file(options.errors_path)
    _assemble(journal, options.output, failed=False)
    journal.delete()


def _assemble(journal: Journal, path: Path, *, failed: bool) -> None:
    # Through a link, to where it leads: replacing the link itself would surprise.
    with atomic_writer(path.resolve()) as write:
        for line in journal.lines(failed=failed):
            write(line + b"\n")
