// Everything the page says, [Chinese, English], and how an element says it in the language that is chosen.

const WORDS = {
  "skip": ["跳到正文", "Skip to the content"],
  "tabs": ["页面", "Pages"],
  "tab.chat": ["对话", "Chat"],
  "tab.continue": ["续写", "Continue"],
  "tab.classify": ["分类", "Classify"],
  "tab.runs": ["训练", "Runs"],
  "language": ["English", "中文"],
  "theme": ["浅色或深色", "Light or dark"],
  "settings": ["设置", "Settings"],
  "stop": ["停止", "Stop"],
  "cancel": ["取消", "Cancel"],
  "close": ["关闭", "Close"],
  "copy": ["复制", "Copy"],
  "copy.command": ["复制命令：{line}", "Copy the command: {line}"],
  "copied": ["已复制", "Copied"],
  "copy.failed": ["浏览器不让复制，请手动选中", "The browser does not allow copying; please select the text by hand"],
  "again": ["再试一次", "Try again"],
  "card": ["模型", "Model"],
  "server.loading": ["模型正在载入，好了这里会自己继续……", "The model is loading; this page goes on by itself …"],

  "key.title": ["需要密钥", "A key is needed"],
  "key.why": ["服务器启动时设了 --api_key。密钥只留在这个标签页里，关掉就忘。", "The server was started with --api_key. The key stays in this browser tab and is forgotten when it closes."],
  "key.label": ["密钥", "Key"],
  "key.use": ["使用", "Use it"],
  "key.wrong": ["这个密钥不对。", "That key is not the right one."],

  "error.gone": ["连不上服务器。它可能停了：看看运行 miaobi serve 的终端。", "The server cannot be reached. It may have stopped: look at the terminal where miaobi serve runs."],
  "error.cut": ["连接中途断了。", "The connection broke off."],
  "error.busy": ["排队的人太多了，{seconds} 秒后再试。", "Too many requests are waiting; try again in {seconds} s."],
  "error.loading": ["模型还在载入，稍等再试。", "The model is still loading; try again in a moment."],
  "error.large": ["内容太长，超过了服务器的上限。", "That is longer than the server accepts."],
  "error.key": ["没有密钥，服务器不回答。", "Without the key the server does not answer."],
  "error.server": ["服务器说：{what}", "The server says: {what}"],
  "error.status": ["服务器出了错（{status}）。原因在它的终端里。", "The server failed ({status}). Its terminal says why."],
  "error.page": ["页面出了错：{what}", "The page failed: {what}"],

  "empty.model": ["没有模型", "No model"],
  "empty.model.how": ["服务器启动时没有给模型。停下它，再这样启动：", "The server was started without a model. Stop it, and start it like this:"],
  "empty.chat": ["这个模型不会对话", "This model does not chat"],
  "empty.chat.how": ["它没有对话模板：学的是文章，不是一问一答。可以让它续写，或者换一个用对话训练的模型：", "It has no chat template: it learned from texts, not from dialogues. Let it continue a text, or serve a model that was trained on dialogues:"],
  "empty.continue": ["去续写", "Continue a text"],
  "empty.classify": ["没有分类器", "No classifier"],
  "empty.classify.how": ["先训练一个分类器，再在启动服务器时告诉它在哪里：", "Train a classifier first, then tell the server where it is:"],
  "empty.runs": ["没有训练记录可看", "No runs to look at"],
  "empty.runs.how": ["启动服务器时告诉它训练目录都在哪个文件夹下面：", "Tell the server which folder the run directories are in:"],
  "empty.runs.none": ["这个文件夹里还没有训练记录。训练一开始，这里就会出现曲线：", "There are no runs in that folder yet. As soon as one trains, its curves appear here:"],

  "chat.new": ["新对话", "New"],
  "chat.export": ["导出", "Export"],
  "chat.log": ["对话内容", "Conversation"],
  "chat.say": ["你说", "You say"],
  "chat.placeholder": ["说点什么……", "Say something …"],
  "chat.keys": ["Enter 发送 · Shift+Enter 换行 · Esc 停止", "Enter sends · Shift+Enter breaks the line · Esc stops"],
  "chat.send": ["发送", "Send"],
  "chat.hello": ["说一句话，开始对话。", "Say something to begin."],
  "chat.you": ["你", "You"],
  "chat.model": ["模型", "Model"],
  "chat.edit": ["改", "Edit"],
  "chat.edit.label": ["改这句话，从这里重新开始", "Edit this turn and go on from there"],
  "chat.retry": ["重答", "Retry"],
  "chat.goon": ["从这里继续", "Go on from here"],
  "chat.edited": ["改这句话", "Edit this turn"],
  "chat.stopped": ["已停止", "stopped"],
  "chat.length": ["到了长度上限", "reached the length limit"],
  "chat.figures": ["{tokens} 个词元 · {speed} 个/秒", "{tokens} tokens · {speed}/s"],
  "chat.nothing": ["（没有说话）", "(said nothing)"],

  "set.system": ["系统提示", "System prompt"],
  "set.system.why": ["对话前先告诉模型的话；训练时没见过的，多半没有用", "Told to the model before the conversation; of little use if it saw none in training"],
  "set.max_tokens": ["回答最长", "Longest reply"],
  "set.max_tokens.why": ["词元数", "tokens"],
  "set.temperature": ["温度", "Temperature"],
  "set.temperature.why": ["越低越稳，越高越野；0 总选最可能的", "lower is safer, higher wilder; 0 always takes the likeliest"],
  "set.top_p": ["top_p", "top_p"],
  "set.top_p.why": ["只在加起来占这么多概率的字里选", "choose among the likeliest that hold this much probability"],
  "set.top_k": ["top_k", "top_k"],
  "set.top_k.why": ["只在最可能的这么多个里选；0 不限", "choose among this many likeliest; 0 = no limit"],
  "set.min_p": ["min_p", "min_p"],
  "set.min_p.why": ["比最可能的小太多就不选", "drop what is less likely than this share of the likeliest"],
  "set.repetition_penalty": ["重复惩罚", "Repetition penalty"],
  "set.repetition_penalty.why": ["大于 1 少重复", "above 1 repeats less"],
  "set.seed": ["种子", "Seed"],
  "set.seed.why": ["填了，同样的话得到同样的回答；空着每次不同", "with one, the same words give the same answer; empty = another each time"],
  "set.reset": ["恢复默认", "Defaults"],
  "set.note": ["对话和续写共用。", "Shared by Chat and Continue."],

  "card.parameters": ["参数", "Parameters"],
  "card.family": ["结构", "Family"],
  "card.block": ["上下文", "Context"],
  "card.tokens": ["{n} 个词元", "{n} tokens"],
  "card.vocabulary": ["词表", "Vocabulary"],
  "card.step": ["训练步数", "Step"],
  "card.version": ["miaobi 版本", "miaobi version"],
  "card.text": ["模型说明", "Model card"],

  "continue.prompt": ["开头", "Beginning"],
  "continue.placeholder": ["写个开头，例如：新华社北京", "Begin a text, for example: 新华社北京"],
  "continue.count": ["几份", "How many"],
  "continue.length": ["每份最长", "Tokens each"],
  "continue.write": ["续写", "Write on"],
  "continue.sure": ["很有把握", "sure"],
  "continue.surprised": ["出人意料", "surprised"],
  "continue.how": ["点一个字，看模型还想过什么；选一个，就从那里重写。键盘：← → 移动，Enter 打开。", "Pick a character to see what else the model considered; choose one to go on from there. Keys: ← → move, Enter opens."],
  "continue.cut": ["上文太长：模型只看最后 {n} 个词元", "too long to see whole: the model reads the last {n} tokens"],
  "continue.column": ["第 {n} 份", "Version {n}"],
  "continue.undo": ["撤销", "Undo"],
  "continue.more": ["继续写", "More"],
  "continue.ended": ["写完了", "ended"],
  "continue.chance": ["概率 {p}", "probability {p}"],
  "continue.pieces": ["由 {n} 个字节片拼成", "made of {n} byte pieces"],
  "continue.instead": ["换成", "Instead"],
  "continue.half": ["半个字", "half a character"],
  "continue.other": ["其余", "all others"],

  "classify.text": ["要判断的话", "Text to judge"],
  "classify.placeholder": ["房间很干净，下次还来。", "房间很干净，下次还来。"],
  "classify.known": ["它认得：", "It knows:"],
  "classify.judge": ["判断", "Judge"],
  "classify.marks": ["哪些字起了作用", "What mattered"],
  "classify.for": ["支持“{label}”", "for “{label}”"],
  "classify.against": ["反对", "against it"],
  "classify.how": ["算法：逐个遮掉（留一法），看“{label}”的概率降多少；降得越多，颜色越深。", "How: each piece is left out in turn (leave-one-out); the more the probability of “{label}” falls, the darker it is."],

  "file.title": ["整个文件", "A whole file"],
  "file.drop": ["把 CSV 拖到这里，或点一下选文件", "Drop a CSV here, or click to choose one"],
  "file.kinds": ["CSV、TSV，或一行一条的 TXT；UTF-8 或 GBK", "CSV, TSV, or TXT with a text a line; UTF-8 or GBK"],
  "file.column": ["要判断的列", "Column to judge"],
  "file.read": ["{name}：{rows} 行，{encoding}", "{name}: {rows} rows, {encoding}"],
  "file.named": ["第一行是列名", "First row names the columns"],
  "file.start": ["开始", "Start"],
  "file.progress": ["{done} / {all} 行", "{done} of {all} rows"],
  "file.done": ["判断完了：{counts}", "Done: {counts}"],
  "file.stopped": ["停在第 {done} 行", "Stopped at row {done}"],
  "file.save": ["下载 {name}", "Download {name}"],
  "file.empty": ["这个文件里没有一行文字。", "There is no row of text in this file."],
  "file.binary": ["这不像文字文件：{name} 里有零字节。", "This does not look like a text file: {name} has zero bytes."],
  "file.encoding": ["{name} 不是 UTF-8、GB18030、Big5 中的任何一种，读不出来。另存为 UTF-8 再试。", "{name} is neither UTF-8, GB18030 nor Big5. Save it as UTF-8 and try again."],
  "file.quote": ["第 {row} 行的引号没有合上，表格从那里读不准。", "The quote in row {row} is never closed; the table cannot be read from there."],
  "file.blank": ["{n} 行是空的，不判断", "{n} empty rows are left unjudged"],
  "file.big": ["{name} 太大（超过 200 MB）；用 miaobi classify predict 处理。", "{name} is too large (over 200 MB); use miaobi classify predict."],

  "runs.title": ["训练记录", "Runs"],
  "runs.none": ["在左边勾选一个或几个，曲线画在同一张图上。", "Tick one or several; their curves are drawn over each other."],
  "runs.samples": ["样例", "Samples"],
  "runs.of": ["哪次训练的样例", "Samples of which run"],
  "runs.step": ["第 {step} 步", "Step {step}"],
  "runs.steps": ["{step} / {max} 步", "step {step} of {max}"],
  "runs.best": ["最好验证损失 {best}", "best validation loss {best}"],
  "runs.training": ["训练中", "training"],
  "runs.finished": ["已完成", "finished"],
  "runs.stopped": ["已停下", "stopped"],
  "runs.bits": ["验证集，每字比特", "Validation, bits per character"],
  "runs.bits.why": ["越低越好；淡线是训练集", "lower is better; the faint line is the training text"],
  "runs.rate": ["学习率", "Learning rate"],
  "runs.speed": ["每秒词元", "Tokens per second"],
  "runs.loss": ["验证损失", "Validation loss"],
  "runs.accuracy": ["验证准确率", "Validation accuracy"],
  "runs.chart": ["{title}。{values}。← → 键逐点读数。", "{title}. {values}. ← → keys read it point by point."],
  "runs.nosamples": ["这次训练没有留下样例。", "This run kept no samples."],
};

const index = () => (document.documentElement.lang === "en" ? 1 : 0);

/** The words of `key`, its {names} filled in. */
export function t(key, values = {}) {
  const words = WORDS[key];
  if (!words) throw new Error(`no words for ${key}`);
  return words[index()].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

const said = new WeakMap();

// Controls, and the marks that turn the direction of writing around: a text may not repaint what stands beside it.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

/** The text with control characters as visible signs; line ends and tabs stay. */
export const visible = (text) => String(text ?? "").replace(UNSEEN, (c) => {
  const code = c.charCodeAt(0);
  return code < 0x20 ? String.fromCharCode(0x2400 + code) : code === 0x7f ? "\u2421" : "\ufffd";
});

function write(node, where, key, values) {
  const words = visible(t(key, values));
  if (where === "text") node.textContent = words;
  else if (where === "placeholder") node.placeholder = words;
  else {
    node.setAttribute("aria-label", words);
    if (node.tagName === "BUTTON") node.title = words;
  }
}

/** Let `node` say `key`, now and after a change of language. where: text, label (for those who do not see it), placeholder. */
export function say(node, key, values = {}, where = "text") {
  node.setAttribute(where === "text" ? "data-t" : `data-t-${where}`, key);
  const known = said.get(node) ?? {};
  known[where] = values;
  said.set(node, known);
  write(node, where, key, values);
}

/** Say everything below `root` again, in the language of the document. */
export function translate(root = document) {
  for (const where of ["text", "label", "placeholder"]) {
    const name = where === "text" ? "data-t" : `data-t-${where}`;
    for (const node of root.querySelectorAll(`[${name}]`)) {
      write(node, where, node.getAttribute(name), said.get(node)?.[where]);
    }
  }
}
