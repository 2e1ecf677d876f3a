"""Verb doctor."""

from collections.abc import Sequence
from dataclasses import asdict

from infir2.cli.arguments import Parser
from infir2.errors import CheckFailedError
from infir2.terminal import print_json, print_result


def doctor(arguments: Sequence[str]) -> None:
    """infir2 doctor

    Raises:
        CheckFailedError: something on this machine does not work; the line says what.
    """
    parser = Parser(
        prog="infir2 doctor",
        description=(
            "Says what this machine computes with and why, tries one FP8 layer against the "
            "reference, and names what is slow or missing and how to install it."
        ),
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    from infir2.doctor.examine import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not options.json:
            print_result(str(finding))
    if options.json:
        print_json([asdict(finding) for finding in findings])
    failed = [finding.check for finding in findings if finding.status == "fail"]
    if failed:
        raise CheckFailedError(
            f"{', '.join(failed)}: not in order on this machine; the lines marked FAIL say why."
        )
