"""`certctl status`: all Certificates in a table, or one in detail."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certbotk8s.certctl.reader import Reader, log_to_stderr
from certbotk8s.certctl.table import line, table, widths
from certbotk8s.certctl.view import Detail, detail_document, detail_lines, document, head, row, summary
from certbotk8s.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from certbotk8s.certctl.reader import Connection
    from certbotk8s.domain.api import Certificate

# Columns of a watch are at least this wide: what comes later is not known when the head is printed.
_WATCH_WIDTH = 8


@dataclass(frozen=True)
class Options:
    """What `certctl status` was asked for. `output` is "", `wide` or `json`."""

    name: str = ""
    all_namespaces: bool = False
    selector: str = ""
    output: str = ""
    headers: bool = True


def show(connection: Connection, options: Options) -> None:
    """Print the table, or with a name the detail."""
    reader, now = Reader(connection), SystemClock().now()
    if options.name:
        certificate = reader.certificate(options.name)
        detail = Detail(certificate, reader.issuer(certificate), reader.events(certificate))
        if options.output == "json":
            _print_json(detail_document(detail, now))
        else:
            print("\n".join(detail_lines(detail, now)))
        return
    namespace = "" if options.all_namespaces else reader.namespace
    certificates = reader.certificates(namespace, selector=options.selector)
    if options.output == "json":
        _print_json({"items": [document(each, now) for each in certificates]})
    elif not certificates:
        print("No certificates found" + (f" in namespace {namespace}." if namespace else "."), file=sys.stderr)
    else:
        wide, all_namespaces = options.output == "wide", options.all_namespaces
        rows = [row(each, now, wide=wide, namespaces=all_namespaces) for each in certificates]
        if options.headers:
            print("\n".join([*table([head(wide=wide, namespaces=all_namespaces), *rows]), summary(certificates, now)]))
        else:
            print("\n".join(table(rows)))


def watch(connection: Connection, options: Options) -> None:
    """Print every Certificate, and again whenever it changes, until interrupted. JSON comes one object a line."""
    log_to_stderr()
    reader, clock = Reader(connection), SystemClock()
    namespace = "" if options.all_namespaces else reader.namespace
    wide = options.output == "wide"

    def cells(certificate: Certificate) -> list[str]:
        return row(certificate, clock.now(), wide=wide, namespaces=options.all_namespaces)

    # Listed before the watch lists by itself: a watch would try for ever what is refused here with a sentence.
    first = reader.certificates(namespace, selector=options.selector, name=options.name)
    if options.name and not first:
        reader.certificate(options.name)
    top = head(wide=wide, namespaces=options.all_namespaces)
    columns = [max(width, _WATCH_WIDTH) for width in widths([top, *map(cells, first)])]
    if options.headers and options.output != "json":
        print(line(top, columns), flush=True)
    printed: dict[str, dict[str, Any]] = {}
    for change in reader.changes(namespace, clock, selector=options.selector, name=options.name):
        certificate = change.certificate
        facts = document(certificate, clock.now())
        if change.gone:
            printed.pop(certificate.key, None)
            facts["deleted"] = True
        elif printed.get(certificate.key) == facts:
            continue
        else:
            printed[certificate.key] = facts
        if options.output == "json":
            _print_json(facts, lines=True)
        else:
            shown = cells(certificate)
            print(line([*shown[:-1], "Deleted"] if change.gone else shown, columns), flush=True)


def _print_json(value: Mapping[str, Any], *, lines: bool = False) -> None:
    # In ASCII: what strangers wrote cannot steer the terminal, which also takes commands from beyond ASCII.
    print(json.dumps(value, indent=None if lines else 2), flush=True)
