"""The fidelity report as a page: it parses, shows what was found, and runs nothing that a name smuggles in."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lamplighter_agent.package.manifest import read_manifest
from lamplighter_builder.cli import main

HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'"


def build(checkpoint: Path, output: Path, *options: str) -> Path:
    arguments = ["-m", str(checkpoint), "-o", str(output), "-p", "int4", "--name", "tiny", *options]
    assert main(["build", *arguments]) == 0
    return output


@pytest.fixture(scope="module")
def package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(tiny_checkpoint, folder / HOSTILE)
    return build(folder / HOSTILE, folder / "package", "--target-mb", "0.2")


@pytest.fixture(scope="module")
def page(package: Path) -> ElementTree.Element:
    return ElementTree.fromstring((package / "fidelity.html").read_text(encoding="utf-8"))


def texts(element: ElementTree.Element) -> Iterator[str]:
    return (text.strip() for text in element.itertext())


def test_names_stay_text(page: ElementTree.Element) -> None:
    assert not {"img", "script"} & {element.tag for element in page.iter()}
    assert any(text.startswith(f"{HOSTILE}, on ") for text in texts(page))


def test_nothing_is_fetched(page: ElementTree.Element, package: Path) -> None:
    assert not {"link", "script", "iframe", "object", "image"} & {element.tag for element in page.iter()}
    assert not {"src", "href", "srcset", "data"} & {name for element in page.iter() for name in element.attrib}
    assert not re.search(r"url\(|@import|https?:", (package / "fidelity.html").read_text(encoding="utf-8"))


def test_every_matrix_has_a_dot_and_a_row(page: ElementTree.Element, package: Path) -> None:
    matrices = json.loads((package / "fidelity.json").read_text())["matrices"]
    _, errors = page.iter("svg")
    dots = [dot.findtext("title", "") for dot in errors.iter("circle")]
    rows = ["".join(row[0].itertext()) for row in page.iter("tr")]
    assert [title.partition(":")[0] for title in dots] == [matrix["path"] for matrix in matrices]
    assert {matrix["path"] for matrix in matrices} <= set(rows)
    assert {"layer", "0", "1"} <= set(texts(errors))


def test_every_size_that_was_weighed_is_shown_beside_what_was_measured(
    page: ElementTree.Element, package: Path
) -> None:
    report = json.loads((package / "fidelity.json").read_text())
    sizes, _ = page.iter("svg")
    *weighed, measured = [dot.findtext("title", "") for dot in sizes.iter("circle")]
    assert len(weighed) == len(report["alternatives"])
    assert measured.endswith(f"{report['fidelity']['kl_mean']:.4f} nats measured")
    assert {"MB of all matrices", "mean KL divergence, nats a token"} <= set(texts(sizes))


def test_dots_lie_within_the_plots(page: ElementTree.Element) -> None:
    for plot in page.iter("svg"):
        _, _, width, height = map(float, plot.attrib["viewBox"].split())
        for dot in plot.iter("circle"):
            assert 0 <= float(dot.attrib["cx"]) <= width
            assert 0 <= float(dot.attrib["cy"]) <= height


def test_colours_follow_the_readers_choice(page: ElementTree.Element) -> None:
    style = page.findtext("head/style", "")
    light, dark = (set(re.findall(r"--(\w+):#", part)) for part in style.split("@media(prefers-color-scheme:dark)"))
    used = {name for element in page.iter() for name in element.attrib.get("class", "").split()}
    assert light == dark
    assert {name for name in used if re.fullmatch(r"c\d|taken", name)} <= light


def test_build_without_calibration_has_a_page_without_plots(tiny_checkpoint: Path, tmp_path: Path) -> None:
    package = build(tiny_checkpoint, tmp_path / "package")
    page = ElementTree.fromstring((package / "fidelity.html").read_text(encoding="utf-8"))
    assert list(page.iter("svg")) == []
    assert "int8 cache instead of float32" in texts(page)


def test_name_that_is_no_text_is_told_as_far_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"m\xff\x1b[31m")
    shutil.copytree(tiny_checkpoint, source)
    package = build(source, tmp_path / "package")
    page = ElementTree.fromstring((package / "fidelity.html").read_text(encoding="utf-8"))
    assert any(text.startswith("m\ufffd\ufffd[31m, on ") for text in texts(page))
    assert read_manifest(package).provenance.source == "m\ufffd\ufffd[31m"
