// Requests to the server that this page came from; errors in OpenAI's form, events as they come.

const KEY = "ship-ds-api-key";

export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? `the server answered ${status} without saying why`);
    this.status = status;
    this.param = error.param ?? null;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: { message: "the server does not answer: is it still running?" } });
  }
  if (!response.ok) {
    const failed = new ApiError(response.status, await response.json().catch(() => null));
    if (failed.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: Boolean(key) }));
    throw failed;
  }
  return response;
}

export const get = async (path, signal) => (await request("GET", path, undefined, signal)).json();
export const post = async (path, body, signal) => (await request("POST", path, body, signal)).json();
export const download = async (path, body, signal) => (await request("POST", path, body, signal)).blob();

// Each event of a stream: its data as an object. "[DONE]" ends it, an error among them is thrown.
export async function* stream(path, body, signal) {
  const response = await request("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(response.status, event);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
