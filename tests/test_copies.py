"""What is said to be the same in several scripts is the same, byte for byte."""

import difflib
import re
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BANNER = re.compile(r"^ *# ---- .*?(?:\(same in ([\w, ]+)\))? -+$")


def sections(name):
    """{banner: text up to the next one} of a script, for the banners that promise copies."""
    found, banner = {}, None
    for line in (ROOT / f"{name}.py").read_text().splitlines():
        match = BANNER.match(line)
        if match:
            banner = line if match[1] else None
        if banner:
            found.setdefault(banner, []).append(line)
    return found


SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
PROMISES = sorted({(banner, tuple(BANNER.match(banner)[1].split(", "))) for name in SCRIPTS
                   for banner in sections(name)})


def test_there_are_copies():
    assert len(PROMISES) >= 6


@pytest.mark.parametrize("banner, names", PROMISES)
def test_copies_are_the_same(banner, names):
    first, *others = ([line.rstrip() for line in sections(name).get(banner, [])] for name in names)
    assert first, f"{names[0]}.py has no section {banner.strip()}"
    for name, text in zip(names[1:], others):
        difference = "\n".join(difflib.unified_diff(first, text, names[0], name, lineterm="", n=1))
        assert not difference, f"edit all of {', '.join(names)} or drop the promise:\n{difference}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_promises_for_itself(name):
    assert all(name in BANNER.match(banner)[1].split(", ") for banner in sections(name))


@pytest.mark.parametrize("name, share", [("nft", 0.75), ("opd", 0.5)])
def test_siblings_differ_from_grpo_by_the_algorithm(name, share):
    texts = [[line for line, _ in groupby((ROOT / f"{script}.py").read_text().splitlines())]
             for script in ("grpo", name)]
    same = sum(block.size
               for block in difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks())
    assert same >= share * len(texts[1])
