"""Words that people are told: numbers and their nouns agree, and phrases that were wrong once do not come back."""

import ast
import re
from pathlib import Path

import pytest

from miaobi.errors import number_of

ROOT = Path(__file__).parents[1]
NOUNS = (
    "articles|blocks|bytes|characters|checkpoints|chunks|columns|cores|dialogues|documents|duplicates|evaluations|files|"
    "heads|labels|layers|lines|machines|matrices|messages|models|parameters|pieces|places|positions|processes|records|"
    "reviews|rows|samples|sequences|sources|steps|streams|tensors|texts|threads|tokens|turns|weights|workers"
)
_PLURAL = re.compile(rf"( more| training| other| such)? ({NOUNS})\b(?!/)")


@pytest.mark.parametrize(("n", "one", "shown"), [
    (1, "document", "1 document"), (0, "document", "0 documents"), (2, "row", "2 rows"), (1, "row", "1 row"),
    (1234567, "token", "1,234,567 tokens"), (1, "process", "1 process"), (3, "process", "3 processes"),
    (2, "matrix", "2 matrices"), (True, "file", "1 file"), (-1, "step", "-1 steps"), (2, "branch", "2 branches"),
    (1, "training token", "1 training token"),
])  # fmt: skip
def test_a_number_and_its_noun_agree(n, one, shown):
    assert number_of(n, one) == shown


def plurals(source: str) -> list[tuple[int, str]]:
    """(line, text) of numbers in f-strings that are followed by a plural, whatever the number is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not (isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)):
                continue
            match, number = _PLURAL.match(after.value), ast.unparse(value.value)
            form = ast.unparse(value.format_spec) if value.format_spec else ""
            is_fraction = re.search(r"\.\d*[fg%]|g|%", form) or "/ 1e" in number
            if match and not is_fraction and not number.isupper() and not number.startswith("number_of("):
                found.append((node.lineno, f"{{{number}}}{match[0]}"))
    return found


def test_the_scan_finds_a_number_with_a_fixed_plural():
    assert plurals('f"{n:,} documents"') == [(1, "{n} documents")]
    assert plurals('f"{len(x)} more files of {y} characters"') == [(1, "{len(x)} more files"), (1, "{y} characters")]
    fine = (
        "f\"{number_of(n, 'document')} of it\"",
        'f"{n:.1f} tokens"',
        'f"{MOST} files"',
        'f"{n} tokens/s"',
        '"1 documents"[2:]',
    )
    assert [plurals(text) for text in fine] == [[]] * len(fine)


FINE = re.compile(
    r"vocab_size|block_size|\broom$|longest$|stated$|PIECE|// every|max_tokens|^block$|positions|^size$|^rows$|"
    r"start \+ T|self\.most$|patience$|st_size|bytes|articles|chatterbot|dialogues\)$|(figures|said)\['characters|"
    r"shape\.n_layer|figures\['test_units|figures\['duplicates|cores|told\)$|^longer$|choices|^there$|text\)$|"
    r"plan\.micro|work\.steps|shapes\)$|^M \+ 1$|name\)$|tokens\)$|length\(part\)"
)
"""Numbers that are never 1: sizes of models and vocabularies, bounds, texts that are known."""
FILES = sorted((ROOT / "src").rglob("*.py"))


def test_numbers_and_nouns_go_through_one_function():
    """`1 documents` was shown to a user: a plural behind a number is made by `number_of`, or the number is never 1."""
    wrong = [f"{file.relative_to(ROOT)}:{line}: {text}" for file in FILES
             for line, text in plurals(file.read_text(encoding="utf-8"))
             if not FINE.search(text[1 : text.index("}")])]  # fmt: skip
    assert not wrong, "\n".join(wrong)


TOLD = [*FILES, *sorted((ROOT / "src").rglob("*.html")), *sorted((ROOT / "src").rglob("*.js")),
        *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]  # fmt: skip
WRONG = {
    "not Chinese": "两个核时|量过|孪生文件|写完整才看得见|纸面上的扩展|各一份的 ?1/N|(?<!第)一路(?=生成|写|解码|流)",
    "the reviews are 7,766": "7,?767",
    "a plural of one": r"(?<![\d.,-])1 (documents|characters|tokens|files|texts|rows|duplicates)\b(?!`)",
    "a comma is missing": r"\(out_dir of `miaobi train`\) a",
    "a run is no flag": r"--outdir=\w+ --",
}
"""What was found in help, documents and messages: why, and how."""


def told_wrong(text: str) -> list[str]:
    return [f"{why}: {match[0]}" for why, pattern in WRONG.items() for match in re.finditer(pattern, text)]


def test_phrases_that_were_wrong_do_not_come_back():
    found = [bool(told_wrong(text)) for text in ("量过", "有 7,767 条", "1 documents", "11 documents", "1,001 texts")]
    assert found == [True, True, True, False, False]
    told = ((file, told_wrong(file.read_text(encoding="utf-8"))) for file in TOLD)
    wrong = [f"{file.relative_to(ROOT)}: {line}" for file, lines in told for line in lines]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["README.md", "README.en.md"])
def test_both_readmes_tell_where_the_seeds_commands_are_and_how_to_begin(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for told in ("git clone", "-m venv", "CUDA", "torch==", "7,766", "tensorboard --logdir",
                 "`python sentimentalTrain.py config/sentimental.yaml` | `miaobi classify train"):  # fmt: skip
        assert told in text, told
