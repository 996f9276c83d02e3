"""`report.html`: a run, or several side by side, as one page that opens offline."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seedbed.disk import write_atomically
from seedbed.errors import ConfigError, StorageError
from seedbed.runs.info import RunInfo, read_run

HERE = Path(__file__).parent


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of a run, or of several compared, and return where it is.

    Without `output` it is `report.html` in the run folder, or `comparison.html` in the folder around the runs. The page
    is one file of about 2 MB, most of it plotly's JavaScript, and opens no connection.

    Raises:
        ConfigError: no run is given, or one of `runs` is none.
        StorageError: the page cannot be written.
    """
    from seedbed.runs.report.page import page_of_run, page_of_runs

    if not runs:
        raise ConfigError("no run to report on; expected one or more run folders such as runs/NAME")
    infos = [read_run(path) for path in runs]
    output = output or _usual_place(infos)
    if len(infos) == 1:
        page = render("run.html.jinja", page_of_run(infos[0]))
    else:
        page = render("comparison.html.jinja", page_of_runs(infos))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise StorageError(
            f"{output}: the report cannot be written ({error.strerror}); choose another --output"
        ) from None
    return output


def render(template: str, content: Mapping[str, Any]) -> str:
    """The page with `content` in it, every word of which is text, never HTML; its `figures` become the curves."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    plotly = _plotly()
    script = (HERE / "report.js").read_text(encoding="utf-8")
    figures = json.dumps(content["figures"], allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(template).render(
        **content,
        figures_json=Markup(figures),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        plotly=base64.b64encode(gzip.compress(plotly, compresslevel=4, mtime=0)).decode(),
        scripts_allowed=f"'{_fingerprint(script.encode())}' '{_fingerprint(plotly)}'",
    )
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair has no place in a file


def _usual_place(runs: Sequence[RunInfo]) -> Path:
    if len(runs) == 1:
        return runs[0].path / "report.html"
    return Path(os.path.commonpath([run.path.resolve().parent for run in runs])) / "comparison.html"


def _plotly() -> bytes:
    """plotly's JavaScript, read past the library, whose import takes longer than all the rest."""
    from importlib.util import find_spec

    package = find_spec("plotly")
    assert package and package.submodule_search_locations, "plotly is installed with seedbed"
    return Path(package.submodule_search_locations[0], "package_data", "plotly.min.js").read_bytes()


def _fingerprint(code: bytes) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}"
