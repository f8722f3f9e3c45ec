"""transformers' pipelines on directories of miaobi: text generation, and classification with a tuned one.

python examples/pipelines.py my_run/checkpoints/best 中国 --classifier=my_classifier/model
"""

import argparse

from transformers import pipeline


def main(model: str, text: str, classifier: str | None, length: int) -> tuple[str, dict | None]:
    """A greedy continuation of `text` by `length` tokens, and what a classifier says of it: {label, score}."""
    generate = pipeline("text-generation", model, device="cpu")
    (written,) = generate(text, max_new_tokens=length, do_sample=False, repetition_penalty=1.0)
    said = pipeline("text-classification", classifier, device="cpu")(text)[0] if classifier else None
    return written["generated_text"], said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--classifier")
    parser.add_argument("--length", type=int, default=50)
    print(*main(**vars(parser.parse_args())), sep="\n")
