#!/bin/sh
# Makes the models that come with miaobi from texts: prepares, trains, tunes, releases. The same command goes on.
#   DATA=texts WORK=dir nice -n 19 models/retrain.sh     # DATA, WORK: absolute, or from the root of the checkout
# DATA holds the files that are named below; only texts whose licence lets weights ship are among them (models/sources.csv).
# WORK keeps what is made on the way (default released_run). THREADS: of the machine's cores, how many compute (default 1).
set -eu
: "${DATA:?the directory of the texts: DATA=texts models/retrain.sh}"
root=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(cd "$DATA" && pwd)
WORK=${WORK:-$root/released_run}
mkdir -p "$WORK"
cd "$WORK"
export OMP_NUM_THREADS="${THREADS:-1}"
miaobi() { "${PYTHON:-python}" -m miaobi "$@"; }

if [ ! -f base_data/manifest.json ]; then
    miaobi prepare "$DATA/news/xinwenlianbo_2022_2026.jsonl.xz" "$DATA/news/peoples_daily_199801.txt.xz" \
        "$DATA/news/inews_sentiment.jsonl.xz" "$DATA/general/lctt_articles.jsonl.xz" \
        "$DATA/general/cmrc2018_wiki_paragraphs.jsonl.xz" "$DATA/novels/hongloumeng.txt" "$DATA/novels/sanguoyanyi.txt" \
        "$DATA/novels/shuihuzhuan.txt" "$DATA/chat/dgk_tv_subtitles.txt.xz" "$DATA/chat/smile_support.txt.xz" \
        --weights=1 --weights=1 --weights=1 --weights=1 --weights=1 --weights=1 --weights=1 --weights=1 --weights=1 \
        --weights=0.15 --tokenizer=bpe --vocab_size=6400 --val_fraction=0.01 --dedup=near \
        --without="$DATA/sentiment/ChnSentiCorp_htl_all.csv" --without="$DATA/sentiment/waimai_10k.csv" --out base_data
fi
miaobi train "$root/models/base.yaml" --device=cpu

# Counselling (18M characters) is at most 15% of the share of all dialogues: 0.04 of it beside 4.3M of subtitles.
if [ ! -f chat_data/manifest.json ]; then
    miaobi prepare "$DATA/chat/dgk_tv_subtitles.txt.xz" "$DATA/chat/smile_support.txt.xz" --weights=1 --weights=0.04 \
        --format=dialogue --tokenizer=base_data --val_fraction=0.02 --dedup=near --out chat_data
fi
miaobi train "$root/models/chat.yaml" --device=cpu
if [ ! -f chat_preferred/preference.json ]; then
    (cd "$root" && "${PYTHON:-python}" -m models.steps.preference "$WORK/chat_run" --data="$WORK/chat_data" --out="$WORK/chat_preferred")
fi

# Title and text in one, labels in words: 0, 1, 2 of the file are good, neither and bad news.
if [ ! -f sentiment.jsonl ]; then
    xz --decompress --stdout "$DATA/news/inews_sentiment.jsonl.xz" | "${PYTHON:-python}" -c "
import json, sys
for line in sys.stdin.buffer:
    row = json.loads(line)
    text = (row['title'] + '\n' + row['text']).strip()
    print(json.dumps({'label': ('正面', '中性', '负面')[row['label']], 'text': text}))
" > sentiment.jsonl.part
    mv sentiment.jsonl.part sentiment.jsonl
fi
miaobi classify train "$root/models/sentiment.yaml" --device=cpu

cd "$root"
"${PYTHON:-python}" -m models.steps.release "$WORK"
