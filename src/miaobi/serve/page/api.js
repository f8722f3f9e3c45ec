// Requests to the server this page came from, and what their failures mean in words.

const BASE = new URL(".", document.baseURI);
const KEY = "miaobi.key";
let asking = null;

/** Something that a person can be told: a key of words.js, and its values. */
export class Failure extends Error {
  constructor(key, values = {}) {
    super(key);
    this.key = key;
    this.values = values;
  }
}

export const aborted = (error) => error?.name === "AbortError";

const stored = () => { try { return sessionStorage.getItem(KEY); } catch { return null; } };

/** Ask for the key of the server; resolves to whether one was given. One question at a time. */
function askKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key"), input = dialog.querySelector("input");
    const form = dialog.querySelector("form");
    dialog.querySelector(".error").hidden = !wasWrong;
    input.value = "";
    dialog.returnValue = "";
    dialog.querySelector("[value=cancel]").onclick = () => dialog.close("cancel");
    form.onsubmit = () => { try { sessionStorage.setItem(KEY, input.value.trim()); } catch { /* asked again next time */ } };
    dialog.onclose = () => { asking = null; resolve(dialog.returnValue === "ok"); };
    dialog.showModal();
    input.focus();
  });
  return asking;
}

async function failed(response) {
  let told = "";
  try {
    const answer = await response.json();
    told = answer.error?.message ?? answer.message ?? (typeof answer.detail === "string" ? answer.detail : "");
  } catch { /* no JSON: a proxy's page */ }
  if (response.status === 429) return new Failure("error.busy", { seconds: response.headers.get("retry-after") ?? "?" });
  if (response.status === 503) return new Failure("error.loading");
  if (response.status === 413) return new Failure("error.large");
  if (told) return new Failure("error.server", { what: told });
  return new Failure("error.status", { status: response.status });
}

/** The answer to GET path, or to POST path where there is a body. Throws Failure, or AbortError from `signal`. */
export async function request(path, { body, signal } = {}) {
  for (let tries = 0; ; tries += 1) {
    const key = stored(), headers = {};
    if (key) headers.authorization = `Bearer ${key}`;
    if (body) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, BASE), {
        method: body ? "POST" : "GET", headers, signal, cache: "no-store", redirect: "error",
        body: body && JSON.stringify(body),
      });
    } catch (error) {
      throw aborted(error) ? error : new Failure("error.gone");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await failed(response);
    const changed = stored() !== key; // another request asked meanwhile
    if (!changed && !await askKey(key != null)) throw new Failure("error.key");
  }
}

export const fetchJson = async (path, options) => (await request(path, options)).json();

/**
 * The JSON of each server-sent event, up to [DONE]. opened: called with the response before the first.
 * Throws Failure for an error frame or a stream that breaks.
 */
export async function* events(path, { opened, ...options } = {}) {
  const response = await request(path, options);
  await opened?.(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        const lines = frame.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (!data) continue;
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Failure("error.server", { what: event.error.message ?? "" });
        yield event;
      }
    }
  } catch (error) {
    throw aborted(error) || error instanceof Failure ? error : new Failure("error.cut");
  } finally {
    reader.cancel().catch(() => {});
  }
}
