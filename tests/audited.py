"""Every verb in one process that Python's audit events are counted in, on clean and on hostile files.

    python tests/audited.py DIRECTORY      # prints JSON: what was seen, and how each command ended

Run by tests/test_audit.py. The hook goes in before anything of miaobi is imported.
"""

import json
import os
import sys
from pathlib import Path

WORD = "evil_8f3a"
"""Stands in every program that the hostile files hold: no compiler may ever see it."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PROCESSES = {"os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.startfile", "pty.spawn"}
seen: dict[str, dict[str, int]] = {}
reading_hostile = False


def caller(depth: int = 2) -> str:
    """The file of the code that caused an event."""
    frame = sys._getframe(depth)
    return frame.f_code.co_filename


def note(kind: str, what: str) -> None:
    seen.setdefault(kind, {})
    seen[kind][what] = seen[kind].get(what, 0) + 1


def hook(event: str, args: tuple) -> None:
    if event == "pickle.find_class":
        note(event, f"{args[0]}.{args[1]}")
    elif event in ("exec", "compile"):
        code = args[0]
        name = code.co_filename if hasattr(code, "co_filename") else str(args[1])
        text = code if isinstance(code, (str, bytes)) else repr(code.co_consts) if event == "exec" else ""
        if WORD in str(text)[:100_000]:
            note("foreign text", f"{event} {name}")
        if not os.path.isabs(name) and not name.startswith("<frozen"):
            name = f"{name} by {caller(2)}"
        note(event, name)
    elif event in (
        "os.system",
        "subprocess.Popen",
        "os.posix_spawn",
        "os.exec",
        "os.fork",
        "os.startfile",
        "pty.spawn",
    ):
        note("process", f"{event} {' '.join(map(str, args[1])) if event == 'subprocess.Popen' else args[0]}")
    elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        note("network", f"{event} {args[-1]}")
    elif event == "ctypes.dlopen":
        note(event, str(args[0]))
    elif event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & WRITING:
        note("written", os.path.abspath(os.fsdecode(args[0])))


sys.addaudithook(hook)

import hashlib  # noqa: E402
import io  # noqa: E402
import pickle  # noqa: E402
import shutil  # noqa: E402

from miaobi import cli, demo  # noqa: E402
from miaobi.datasets import PUBLIC  # noqa: E402

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--eval_interval=2",
        "--eval_iters=1", "--sample_tokens=4", "--device=cpu", "--dtype=float32", "--compile=False"]  # fmt: skip
FAST = ["--device=cpu", "--dtype=float32"]
ended: dict[str, int] = {}


def miaobi(*words: object, stdin: str = "") -> None:
    """A command line; how it ended is noted."""
    sys.stdin, code = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"), 0
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        cli.main([str(word) for word in words])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        sys.stdout = before
    how_it_ended(words, code)


def how_it_ended(words: tuple, code: int) -> None:
    name = f"{'hostile' if reading_hostile else 'clean'}: {' '.join(map(str, words))[:160]}"
    ended[name] = max(code, ended.get(name, 0), key=lambda code: (code not in (0, 2), code))


def serve(*words: str) -> None:
    """What `miaobi serve WORDS` loads and answers, without a socket: every path of its API is asked once."""
    from fastapi.testclient import TestClient

    from miaobi import seeds, settings
    from miaobi.command_line import place_words, split
    from miaobi.errors import UserError
    from miaobi.serve.app import make_app
    from miaobi.serve.config import Serve
    from miaobi.serve.served import load
    from miaobi.serve.server import check

    line, code = split(Serve, seeds.MODEL, list(words)), 0
    try:
        cfg, origin = settings.load(Serve, seeds.MODEL, "miaobi serve", place_words(Serve, seeds.MODEL, line))
        check(cfg)
        app = make_app(cfg)
        app.state.served = load(cfg, list(origin), app.state.metrics)
    except UserError as e:
        print(e, file=sys.stderr)
        how_it_ended(("serve", *words), 2)
        return
    with TestClient(app, base_url="http://127.0.0.1") as client:
        turns = [{"role": "user", "content": f"{JINJA}{WORD}"}]
        posts = {
            "/v1/chat/completions": {"messages": turns, "max_tokens": 2, "model": "x"},
            "/v1/completions": {"prompt": JINJA, "max_tokens": 2, "model": "x"},
            "/v1/responses": {"input": JINJA, "max_output_tokens": 16, "model": "x"},
            "/tokenize": {"messages": turns}, "/detokenize": {"tokens": [1, 2]}, "/classify": {"input": [JINJA]},
        }  # fmt: skip
        answers = [client.post(path, json=body) for path, body in posts.items()]
        names = [run["name"] for run in client.get("/api/runs").json()]
        paths = ("/", "/v1/models", "/health", "/metrics", "/api/info", *(f"/api/runs/{name}" for name in names))
        answers += [client.get(path) for path in paths]
        code = max(0 if answer.status_code < 500 else 1 for answer in answers)
    app.state.served.close()
    how_it_ended(("serve", *words), code)


class Evil:
    """A pickle of it makes a file, when anything unpickles it."""

    def __reduce__(self):
        return exec, (f"{WORD} = open('{Path('executed').absolute()}', 'w')",)


PROGRAM = f"{WORD} = open('{Path('executed').absolute()}', 'w')"
JINJA = ("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.popen('touch executed') }}"
         f"{{# {WORD} #}}")  # fmt: skip
YAML = f"out_dir: !!python/object/apply:os.system ['touch executed # {WORD}']\n"


def clean(reviews: str) -> None:
    """Every verb as it is meant."""
    miaobi("prepare", "text.txt", "--out=data", "--workers=1")
    miaobi("prepare", "talk.txt", "--out=talk", "--format=dialogue", "--template=chatml", "--workers=2")
    miaobi("train", "--data=data", "--out_dir=run", "--max_iters=2", *TINY)
    miaobi("train", "--data=data", "--out_dir=run", "--max_iters=4", "--mirror=far", *TINY)
    roomy = [flag.replace("block_size=16", "block_size=64") for flag in TINY]  # for the template around a message
    miaobi("train", "--data=talk", "--out_dir=chatty", "--max_iters=2", *roomy)
    miaobi("sample", "run", "--start=皇马", "--max_new_tokens=3", "--num_samples=2", "--device=cpu")
    miaobi("eval", "run", "data", "--device=cpu")
    miaobi("chat", "chatty", "--max_new_tokens=3", "--device=cpu", stdin="你好\nexit\n")
    miaobi("classify", "train", "--base_model=run", f"--data={reviews}", "--out_dir=judge", "--max_epoch=1", *FAST)
    miaobi("classify", "ablate", "--base_model=run", f"--data={reviews}", "--out_dir=grid", "--max_epoch=1",
           "--trainable=head", *FAST)  # fmt: skip
    miaobi("classify", "predict", "judge", "皇马赢了", "--device=cpu")
    miaobi("plan", "--data=data", "--out_dir=planned", *TINY)
    miaobi("report", "run")
    miaobi("doctor")
    miaobi("push", "run", "me/mine", "--dry_run")
    miaobi("convert", "gguf", "run", "--out=run.gguf")
    miaobi("convert", "quantize", "run", "--dtype=int4", "--out=run-int4")
    serve("chatty", "--classifier=judge", "--runs=.")
    miaobi("data", "list")
    digest = hashlib.sha256(Path(reviews).read_bytes()).hexdigest()
    known = {"url": PUBLIC["hotel-reviews"].url, "license": "none",
             "sha256": {"ChnSentiCorp_htl_all.csv": digest}}  # fmt: skip
    Path("got").mkdir()
    shutil.copy(reviews, "got/ChnSentiCorp_htl_all.csv")
    Path("got/.ChnSentiCorp_htl_all.csv.source.json").write_text(json.dumps(known), encoding="utf-8")
    miaobi("data", "get", "hotel-reviews", "--out=got")
    demo.QUICK |= {"max_iters": 2, "eval_interval": 2, "n_layer": 1, "n_embd": 32, "eval_iters": 1}
    demo.QUICK_CHAT |= {"max_iters": 2, "eval_interval": 2, "n_layer": 1, "n_embd": 32, "n_head": 2, "eval_iters": 1}
    miaobi("demo", "--quick", "--out_dir=shown")
    to_be_converted()


def to_be_converted() -> None:
    """Checkpoints as nanoGPT and small-gpt write them."""
    import torch
    from originals import NANOGPT, SMALL_GPT, Original, chat_text, naive_vocabulary

    letters = sorted(set(Path("text.txt").read_text(encoding="utf-8")))
    spelled = {"itos": dict(enumerate(letters)), "stoi": {letter: i for i, letter in enumerate(letters)}}
    Path("meta.pkl").write_bytes(pickle.dumps(spelled))
    torch.save(Original.random(NANOGPT, True, len(letters)).nanogpt(), "ckpt.pt")
    Path("chats.txt").write_text(chat_text(), encoding="utf-8")
    torch.save(Original.random(SMALL_GPT, True, len(naive_vocabulary(chat_text()))).small_gpt(), "model.pth")
    miaobi("convert", "nanogpt", "ckpt.pt", "--meta=meta.pkl", "--out=from-nanogpt")
    miaobi("convert", "small-gpt", "model.pth", "--corpus=chats.txt", "--out=from-small-gpt")


def hostile(reviews: str) -> None:
    """The same verbs on what a stranger would leave there."""
    import torch

    evil = pickle.dumps(Evil())
    for name in (
        "numpy.py",
        "torch.py",
        "json.py",
        "sitecustomize.py",
        "modeling_evil.py",
        "__init__.py",
        "conftest.py",
    ):
        for folder in (".", "strange", "strange-data", "talk", "data"):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / name).write_text(PROGRAM, encoding="utf-8")
    model = next(Path("run/checkpoints").glob("step-4"))
    shutil.copytree(
        model, "strange", dirs_exist_ok=True, ignore=shutil.ignore_patterns("checksums.json", "train_state")
    )
    config = json.loads(Path("strange/config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "trust_remote_code": True}
    Path("strange/config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads(Path("strange/tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer |= {"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}, "chat_template": JINJA}
    Path("strange/tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    miaobi("sample", "strange", "--start=皇马", "--max_new_tokens=2", "--device=cpu")
    miaobi("chat", "strange", "--device=cpu", stdin="你好\nexit\n")
    miaobi("eval", "strange", "text.txt", "--device=cpu")
    for weights in ("model.safetensors", "pytorch_model.bin"):
        Path("strange/model.safetensors").unlink(missing_ok=True)
        for content in (evil, b"PK\x03\x04" + evil):
            Path("strange", weights).write_bytes(content)
            miaobi("sample", "strange", "--start=皇马", "--device=cpu")
    torch.save({"model": Evil(), "state_dict": Evil()}, "strange/pytorch_model.bin")
    miaobi("sample", "strange", "--start=皇马", "--device=cpu")
    shutil.copy("strange/pytorch_model.bin", "evil.pt")
    shutil.copy("strange/pytorch_model.bin", "evil.pth")
    Path("evil.pkl").write_bytes(evil)
    miaobi("convert", "nanogpt", "evil.pt", "--meta=evil.pkl", "--out=converted")
    miaobi("convert", "small-gpt", "evil.pth", "--corpus=text.txt", "--out=converted")
    miaobi("train", "--init_from=evil.pt", "--data=data", "--out_dir=new", *TINY)
    miaobi("train", "--resume_from=evil.pth", "--data=text.txt", "--out_dir=new", *TINY)
    for name in ("train.bin", "val.bin"):
        shutil.copy(f"data/{name}", f"strange-data/{name}")
    Path("strange-data/meta.pkl").write_bytes(evil)
    miaobi("train", "--data=strange-data", "--out_dir=new", *TINY)
    state = model / "train_state"
    (model / "checksums.json").unlink()
    for file in [*state.glob("optimizer*"), state / "progress.json"]:
        before = file.read_bytes()
        file.write_bytes(evil)
        miaobi("train", "--data=data", "--out_dir=run", "--max_iters=5", *TINY)
        miaobi("train", "--data=data", "--out_dir=other", "--resume_from=run", "--max_iters=5", *TINY)
        file.write_bytes(before)
    for file in state.glob("optimizer*"):
        file.unlink()
    (state / ".metadata").write_bytes(evil)
    miaobi("train", "--data=data", "--out_dir=run", "--max_iters=5", *TINY)
    Path("evil.yaml").write_text(YAML, encoding="utf-8")
    miaobi("train", "evil.yaml", "--data=data", *TINY)
    for file in ("far/config.yaml", "far/last", "far/run", "far/writer.json"):
        Path(file).write_text(YAML, encoding="utf-8")
        miaobi("train", "--data=data", "--out_dir=fetched", "--mirror=far", "--max_iters=4", *TINY)
    judge = next(Path("judge/checkpoints").glob("mask*"))
    for name in ("classifier.json", "config.json", "tokenizer.json", "result.json"):
        (judge / name).write_bytes(evil)
        miaobi("classify", "predict", "judge", "皇马赢了", "--device=cpu")
    miaobi("classify", "train", "--base_model=strange", f"--data={reviews}", "--out_dir=judge2", "--max_epoch=1", *FAST)
    others(evil, reviews)
    names = [
        f"$(touch executed){WORD}.txt",
        f";touch executed;{WORD}.csv",
        f"`touch executed`{WORD}.jsonl",
        f"-c{WORD}.txt",
    ]
    for name in names:
        Path("sources").mkdir(exist_ok=True)
        text = Path("text.txt").read_text(encoding="utf-8") + f"\n\n{PROGRAM}\n\n{JINJA}\n\n=cmd|'/c touch executed'!A1"
        Path("sources", name).write_text(text, encoding="utf-8")
    miaobi("prepare", "sources", "--out=prepared", "--workers=2", "--skip_bad")
    for name in names:
        miaobi("prepare", f"./sources/{name}", "--out=prepared", "--workers=1")
        miaobi("sample", "run", f"--start=FILE:sources/{name}", "--max_new_tokens=2", "--device=cpu")


def others(evil: bytes, reviews: str) -> None:
    """Verbs that read what other verbs wrote."""
    miaobi("classify", "ablate", "--base_model=strange", f"--data={reviews}", "--out_dir=grid2", "--max_epoch=1", *FAST)
    miaobi("plan", "evil.yaml", "--data=data", *TINY)
    miaobi("plan", "--data=strange-data", *TINY)
    miaobi("doctor")
    for file in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "plan.json", "checkpoints/last"):
        shutil.rmtree("copied", ignore_errors=True)
        shutil.copytree("chatty", "copied", symlinks=True)
        for content in (evil, YAML.encode(), json.dumps({"step": 1, "text": JINJA}).encode()):
            Path("copied", file).unlink(missing_ok=True)
            Path("copied", file).write_bytes(content)
            miaobi("report", "copied")
        serve("--runs=copied")
    step = next(Path("chatty/checkpoints").glob("step-2"))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "model.safetensors", "chat_template.jinja"):  # fmt: skip
        shutil.rmtree("stranger", ignore_errors=True)
        shutil.copytree(step, "stranger", ignore=shutil.ignore_patterns("checksums.json", "train_state"))
        Path("stranger", file).write_bytes(JINJA.encode() if file.endswith("jinja") else evil)
        miaobi("convert", "gguf", "stranger", "--out=stranger.gguf")
        miaobi("convert", "quantize", "stranger", "--dtype=int8", "--out=stranger-int8")
        miaobi("push", "stranger", "me/mine", "--dry_run")
        serve("stranger", "--classifier=judge")
    for content in (evil, YAML.encode()):
        Path("got/.ChnSentiCorp_htl_all.csv.source.json").write_bytes(content)
        miaobi("data", "get", "hotel-reviews", "--out=got")
    miaobi("data", "list")
    for file in ("chat/data/manifest.json", "data/manifest.json", "config.yaml"):
        Path("shown", file).write_bytes(evil)
        miaobi("demo", "--quick", "--out_dir=shown")


def main() -> None:
    """Both, in the directory that is given."""
    global reading_hostile
    rows = ["label,review", *(f"{i % 2},{'皇马赢得比赛' if i % 2 else '曼联输掉比赛'}{i}" for i in range(60))]
    Path("reviews.csv").write_text("\n".join(rows), encoding="utf-8")
    lines = [f"第{i}场，皇马赢得比赛，球迷期待冠军。" for i in range(80)]
    Path("text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    Path("talk.txt").write_text("\n\n".join(f"{a}\n好{i}\n嗯" for i, a in enumerate(lines)), encoding="utf-8")
    clean("reviews.csv")
    reading_hostile = True
    hostile("reviews.csv")
    modules = {m: getattr(sys.modules[m], "__file__", None) for m in list(sys.modules)}
    foreign = {m: f for m, f in modules.items() if f and Path(f).is_relative_to(Path.cwd())}
    found = {"seen": dict(seen), "ended": ended, "foreign modules": foreign, "executed": os.path.exists("executed")}
    seen.clear()
    control()
    print(json.dumps(found | {"control": seen}))


def control() -> None:
    """What must not happen, done on purpose: the hook is to see it."""
    import socket

    pickle.loads(pickle.dumps(Evil()))
    os.system("true")
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.path.append(str(Path(__file__).parent / "convert"))
    sys.path.insert(0, "")  # where a careless launcher puts the current directory: nothing there may be imported anew
    main()
