"""The READMEs' own commands run as printed, and the documents hold together: links, errors, no developer's paths."""

import ast
import json
import pickle
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote
from urllib.request import urlopen

import pytest
import torch
from originals import NANOGPT, SMALL_GPT, Original, chat_text, naive_vocabulary
from tests import processes
from tests.processes import Process

from miaobi.config import DataConfig, ModelConfig
from miaobi.corpus.messages import messages_of
from miaobi.corpus.template import CHATML_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.demo import chatterbot, peoples_daily
from miaobi.generate.config import ChatConfig
from miaobi.generate.terminal import COMMANDS
from miaobi.model.checkpoint import save_model
from miaobi.model.transformer import Transformer

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.en.md")
DOCUMENTS = [*READMES, "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
SETUP = [
    "pip install -c constraints.txt -e '.[demo]' && miaobi demo",
    "pip install -c constraints.txt -e '.[demo,dev]' && pytest",
]
SMALLER = {  # appended to the README's lines, so that they take seconds
    "train": "--max_iters=2 --eval_interval=2 --eval_iters=1 --n_layer=1 --n_head=2 --n_embd=32 --batch_size=2 "
    "--block_size=32 --device=cpu --dtype=float32 --sample_tokens=8",
    "sample": "--max_new_tokens=8 --device=cpu",
    "eval": "--device=cpu",
    "chat": "--max_new_tokens=8 --device=cpu",
    "serve": "--device=cpu --port=0",
    "classify": "--device=cpu",
    "classify train": "--max_epoch=1 --seeds=1",
    "classify ablate": "--max_epoch=1",
}
REVIEWS = [f"{label},第{i}间房{said}" for label, said in ((1, "很好"), (0, "太吵")) for i in range(24)]
TYPED = "你好\nexit\n"  # to every chat


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Contents of a document's fenced blocks in some language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    """Every line of every bash block, without comments and blank lines."""
    lines = [line.strip() for block in blocks(name, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# Commands


def test_both_readmes_have_the_same_commands_in_the_same_order():
    assert commands("README.md") == commands("README.en.md")
    assert blocks("README.md", "python") == blocks("README.en.md", "python")


def test_both_readmes_show_the_same_transcript_of_the_demo():
    chinese, english = (re.findall(r"```text\n(.*?)```", read(page), re.S) for page in ("README.md", "README.en.md"))
    assert chinese == english
    assert "bits/char" in chinese[0]


def test_the_readme_begins_with_the_two_setup_commands():
    assert commands("README.md")[:2] == SETUP


def test_ci_runs_the_second_setup_command_verbatim():
    assert SETUP[1] in [line.strip() for line in read(".ci/run").splitlines()]


SMALL_GPT_YAML = """\
data_path: data/train.txt
train_percent: 0.8
block_size: 32
vocab_size: 400
n_layer: 2
n_head: 2
n_embd: 32
dropout: 0.2
bias: True
device: cuda
train_batch: 80
lr: 3e-4
decay_steps: 100000
checkpoint_root: ./checkpoints
resume_from: {resume_from}
seed: 114514
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory such as a reader of the README has: configs, texts, and what nanoGPT and small-gpt left behind."""
    place = tmp_path_factory.mktemp("readme")
    (place / "configs").mkdir()
    for config in ROOT.glob("configs/*.yaml"):
        (place / "configs" / config.name).write_bytes(config.read_bytes())
    text = "\n\n".join(peoples_daily()[:40])  # about 24,000 characters
    (place / "input.txt").write_text(text, encoding="utf-8")
    dialogues = chatterbot()
    (place / "chat.txt").write_text("\n\n".join(map("\n".join, dialogues)) + "\n", encoding="utf-8")
    shapes = [
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        lambda q, a: {"instruction": q, "input": "", "output": a},
    ]
    records = [json.dumps(shapes[i % 3](*said[:2]), ensure_ascii=False) for i, said in enumerate(dialogues)]
    (place / "sft.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    (place / "reviews.csv").write_text("\n".join(["label,review", *REVIEWS]) + "\n", encoding="utf-8")
    (place / "data" / "TH").mkdir(parents=True)
    (place / "data" / "TH" / "input.txt").write_bytes(text.encode("gbk"))
    leave_checkpoints(place)
    leave_hub_model(place / "Qwen" / "Qwen3-0.6B")
    return place


def leave_checkpoints(place: Path) -> None:
    """nanoGPT's out/ckpt.pt and meta.pkl; small-gpt's data/train.txt, YAML files and checkpoint."""
    characters = sorted(set((place / "input.txt").read_text(encoding="utf-8")))
    (place / "out").mkdir()
    torch.save(Original.random(NANOGPT, False, len(characters)).nanogpt(), place / "out" / "ckpt.pt")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    (place / "data" / "TH" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (place / "data" / "train.txt").write_text(chat_text(), encoding="utf-8")
    pretrained = place / "checkpoints" / "pretrained"
    pretrained.mkdir(parents=True)
    original = Original.random(SMALL_GPT, True, len(naive_vocabulary(chat_text())), std=0.02)
    torch.save(original.small_gpt("_orig_mod."), pretrained / "cpt300M.pth")
    (place / "config").mkdir()
    for name, resume_from in (("train90M", ""), ("chat300M", "checkpoints/pretrained/cpt300M.pth")):
        text = SMALL_GPT_YAML.format(resume_from=resume_from)
        (place / "config" / f"{name}.yaml").write_text(text, encoding="utf-8")


def leave_hub_model(directory: Path) -> None:
    """A model under the name of one of the hub's: what exists here is not looked for there."""
    tokenizer = Tokenizer.train_char(dict.fromkeys("你好\nassistantuser", 1))
    tokenizer.config["chat_template"] = CHATML_TEMPLATE
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": tokenizer.vocab_size}
    directory.mkdir(parents=True)
    save_model(directory, Transformer(ModelConfig(family="qwen3", **sizes)), tokenizer, (tokenizer.eot_id,))


def smaller(words: list[str]) -> list[str]:
    """Flags that make a command take seconds: those of its verb, and those of its kind."""
    return [*SMALLER.get(words[0], "").split(), *SMALLER.get(" ".join(words[:2]), "").split()]


def run(words: list[str], place: Path) -> subprocess.CompletedProcess:
    """A command to its end; a server until its page was seen and Ctrl-C pressed."""
    process = Process(["-m", "miaobi", *words], cwd=place, input=TYPED)
    if words[0] == "serve":
        while not (ready := re.search(r"^ready: (http://\S+)", process.said(), re.MULTILINE)):
            assert process.poll() is None, process.said()
            time.sleep(0.02)
        with urlopen(ready[1]) as page:
            assert "妙笔" in page.read().decode()
        process.send_signal(signal.SIGINT)
    return process.wait()


@pytest.mark.slow
def test_the_readmes_commands_and_python_work_in_order(workplace: Path):
    printed = [line for line in commands("README.md") if line.startswith("miaobi ")]
    assert [line.split()[1] for line in printed].count("train") >= 3
    replies = ""
    for line in printed:
        words = shlex.split(line, comments=True)[1:]
        done = run([*words, *smaller(words)], workplace)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or words[0] in ("chat", "serve"), line  # two steps may teach nothing to say
        if words[0] == "sample":
            wanted = 3 if "--num_samples=3" in words else 10
            prompt = next(word.partition("=")[2] for word in words if word.startswith("--start="))
            assert done.stdout.count("---------------") == wanted
            assert done.stdout.startswith(prompt)
        if words[0] == "chat":
            assert not re.search("^miaobi:", done.stderr, re.MULTILINE), f"{line}\n{done.stderr}"
            replies += done.stdout
    assert replies.strip()

    each_alone = "import sys\nfor block in sys.argv[1:]:\n    exec(compile(block, 'README.md', 'exec'), {})"
    done = processes.run(["-c", each_alone, *blocks("README.md", "python")], cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("中国")


# Documents


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(name: str) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = unquote(target).partition("#")
            yield ((ROOT / name).parent / path if path else ROOT / name), anchor


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_point_to_files_and_headings_that_exist(name: str):
    for path, anchor in links(name):
        assert path.exists(), f"{name} links to {path}"
        assert path.resolve().is_relative_to(ROOT), f"{name} links out of the repository: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name} links to the heading #{anchor}"


def test_no_file_names_a_developers_machine():
    listing = ["git", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True, encoding="utf-8").stdout
    somewhere = re.compile(r"(?<![\w.~-])(/(?:work|home|root|Users|tmp/w)/[^\s`'\")]*|[A-Z]:\\Users\\\S*)")
    found = []
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            found += [f"{name}: {match}" for match in somewhere.findall(data.decode("utf-8", "replace"))]
    assert not found


# docs/对话.md


def test_the_page_on_dialogues_names_the_commands_and_defaults_of_the_chat():
    page = read("docs/对话.md")
    default = ChatConfig()
    for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens"):
        assert f"--{name}={getattr(default, name)}" in page
    for command in COMMANDS:
        assert f"`{command.split()[0]}" in page
    assert f"--long_history={DataConfig().long_history}" in page


def test_the_readmes_show_dialogues_that_prepare_reads():
    for name in (*READMES, "docs/对话.md"):
        shown = re.findall(r'`?(\{"(?:messages|conversations|instruction)".*\})', read(name))
        assert len(shown) == 3
        for record in shown:
            messages, problem = messages_of(json.loads(record))
            assert not problem
            assert messages[-1]["role"] == "assistant"


# docs/常见错误.md


def messages(source: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, constant pieces of the message) of every UserError and warning in a file."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called not in ("UserError", "warn") or source.name == "console.py":
            continue
        message: ast.AST = node.args[0]
        if isinstance(message, ast.Call):  # a message that several places share
            shared = functions.get(getattr(message.func, "id", getattr(message.func, "attr", "")))
            if shared is None:
                continue  # it stands in another file
            message = shared
        elif isinstance(message, ast.Name):
            continue  # handed on; its text stands where it was made
        yield node.lineno, [part.value for part in ast.walk(message) if isinstance(part, ast.Constant)]


def test_every_error_is_explained_in_chinese():
    """DESIGN: docs/常见错误 explains every error. Known by the message's first or longest clause."""
    page, unexplained = read("docs/常见错误.md"), []
    for source in sorted((ROOT / "src").rglob("*.py")):
        for line, pieces in messages(source):
            clauses = [c.strip() for p in pieces if isinstance(p, str) for c in re.split(r"[;:.,(){}\n]", p)]
            clauses = [clause for clause in clauses if len(clause) >= 8]
            if clauses and clauses[0] not in page and max(clauses, key=len) not in page:
                unexplained.append(f"{source.relative_to(ROOT)}:{line}: {max(clauses, key=len)}")
    assert not unexplained
