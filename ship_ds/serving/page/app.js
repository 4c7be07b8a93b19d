// What the page's three forms do. Texts of people and of models enter the page as textContent alone.

import { ApiError, download, get, keepKey, post, stream } from "./api.js";
import { LatentMap } from "./map.js";

const $ = (id) => document.getElementById(id);
let run = null;

function element(name, text = "", attributes = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// A cell that says its column where a narrow screen stacks the cells of a row.
function cell(label, content = "", kind = "") {
  const node = element("td", "", { role: "cell", "data-label": label, class: kind });
  node.append(content);
  return node;
}

function row(...cells) {
  const node = element("tr", "", { role: "row" });
  node.append(...cells);
  return node;
}

// "-0.00" is no number that anybody would write.
const fixed = (value, digits) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace(/^-(?=[0.]*$)/, "");

// Errors stand beside the control that they are about.

function complain(id, message) {
  $(`${id}-error`).textContent = message;
  const control = $(id);
  if (!control) return;
  control.setAttribute("aria-invalid", "true");
  control.focus();
}

function forgive(...ids) {
  for (const id of ids) {
    $(`${id}-error`).textContent = "";
    $(id)?.removeAttribute("aria-invalid");
  }
}

// Which control a server's message is about: its `param`, or how the line begins.
function blamed(error, controls, otherwise) {
  const about = `${error.param ?? ""} ${error.message}`;
  const found = controls.find(([word]) => about.trimStart().startsWith(word));
  return found ? found[1] : otherwise;
}

// One job of a form at a time: says that it runs and for how long, and can be cancelled.

class Job {
  constructor(name, submit) {
    this.status = $(`${name}-status`);
    this.cancelButton = $(`${name}-cancel`);
    this.buttons = submit.map($);
    this.cancelButton.addEventListener("click", () => this.cancel());
  }

  get isRunning() {
    return Boolean(this.controller);
  }

  cancel() {
    if (!this.controller) return;
    this.controller.abort();
    this.finish("Cancelled.");
    this.buttons[0].focus();
  }

  // `work(signal, say)` returns the line that stays; `failed(error)` shows what went wrong.
  async start(line, work, failed) {
    if (this.isRunning) return;
    const controller = (this.controller = new AbortController());
    const began = performance.now();
    let about = line;
    const tell = () => {
      const seconds = Math.floor((performance.now() - began) / 1000);
      this.time.textContent = seconds > 1 ? ` ${seconds} s` : "";
    };
    const say = (text) => {
      about = text;
      this.words.textContent = about;
    };
    this.words = element("span", about);
    this.time = element("span", "", { "aria-hidden": "true" }); // else read out each second
    this.status.replaceChildren(this.words, this.time);
    this.status.classList.add("running");
    this.cancelButton.hidden = false;
    for (const button of this.buttons) button.setAttribute("aria-disabled", "true");
    this.timer = setInterval(tell, 500);
    try {
      const end = await work(controller.signal, say);
      if (this.controller === controller) this.finish(end);
    } catch (error) {
      if (controller.signal.aborted) return;
      this.finish("");
      failed(error);
    }
  }

  finish(line) {
    clearInterval(this.timer);
    this.controller = null;
    if (document.activeElement === this.cancelButton) this.buttons[0].focus();
    this.cancelButton.hidden = true;
    this.status.classList.remove("running");
    this.status.textContent = line;
    for (const button of this.buttons) button.removeAttribute("aria-disabled");
  }
}

const instructionJob = new Job("instruction", ["answer", "download"]);
const examplesJob = new Job("examples", ["induce"]);
const adapterJob = new Job("adapter", ["explain"]);

// Lines of a form.

class BadLine extends Error {}

function readTexts(text) {
  return text.split("\n").map((line) => line.trim()).filter(Boolean).map((line) => {
    if (!/^".*"$/.test(line)) return line;
    try {
      return JSON.parse(line);
    } catch {
      return line;
    }
  });
}

const writeText = (text) => (/[\n\r]|^".*"$|^\s|\s$/.test(text) ? JSON.stringify(text) : text);

function readExample(line, number) {
  if (line.startsWith("{")) {
    try {
      const { input, target } = JSON.parse(line);
      if (typeof input === "string" && typeof target === "string") return { input, target };
    } catch { /* said below */ }
    throw new BadLine(`line ${number}: expected {"input": "...", "target": "..."}`);
  }
  const parts = line.match(/^(.*?)\s*(?:->|→|\t)\s*(.*)$/s);
  if (!parts || !parts[2]) throw new BadLine(`line ${number}: expected input -> target`);
  return { input: parts[1].trim(), target: parts[2].trim() };
}

const readExamples = (text) =>
  text.split("\n").map((line, index) => [line.trim(), index + 1]).filter(([line]) => line)
    .map(([line, number]) => readExample(line, number));

// Instruction -> answers, and what is known of the adapter.

const INSTRUCTION_CONTROLS = [["instruction", "instruction"], ["model", "instruction"], ["input", "inputs"], ["prompt", "inputs"]];

function showInstructionError(error) {
  // OpenAI's word for an input.
  const message = error.message.replace(/^prompt (?=\d)/, "input ");
  complain(blamed(error, INSTRUCTION_CONTROLS, "instruction-form"), message);
}

function checkedInstruction() {
  forgive("instruction", "inputs", "instruction-form");
  const instruction = $("instruction").value.trim();
  if (!instruction) complain("instruction", "Say what to do with the inputs.");
  return instruction;
}

async function answer() {
  if (instructionJob.isRunning) return;
  const instruction = checkedInstruction();
  if (!instruction) return;
  const inputs = readTexts($("inputs").value);
  if (!inputs.length) return complain("inputs", "Give at least one input.");
  if (run && inputs.length > run.max_inputs) {
    return complain("inputs", `${inputs.length} inputs are given; this server takes ${run.max_inputs} at once.`);
  }
  await instructionJob.start("Making the adapter.", async (signal, say) => {
    const described = await post("/ship/v1/describe", { instruction }, signal);
    const measuring = showDescription(instruction, described);
    try {
      return await showAnswers(instruction, inputs, signal, say);
    } finally {
      measuring.textContent = "not measured"; // no longer shown where it was
    }
  }, showInstructionError);
}

async function showAnswers(instruction, inputs, signal, say) {
  const rows = showInputs(inputs);
  say("Answering.");
  await Promise.all([
    streamAnswers(`ship:${instruction}`, inputs, rows.map((one) => one.adapted), signal),
    streamAnswers(run.model, inputs, rows.map((one) => one.bare), signal),
  ]);
  say("Trying the adapters around it.");
  const confidence = await post("/ship/v1/confidence", { instruction, inputs }, signal);
  showConfidence(confidence, rows);
  const count = inputs.length === 1 ? "1 answer" : `${inputs.length} answers`;
  return `${count}, agreement ${fixed(confidence.agreement, 2)}.`;
}

// Returns the words in the confidence's place.
function showDescription(instruction, described) {
  $("results").hidden = false;
  $("results-instruction").textContent = instruction;
  $("far").hidden = !described.warning;
  $("far").textContent = described.warning ?? "";
  $("doubt").hidden = true;
  const measuring = element("span", "being measured");
  $("confidence").replaceChildren(measuring);
  $("reconstruction").textContent = described.reconstruction ?? "this run has no decoder";
  $("nearest").replaceChildren(...described.nearest.map((known) =>
    row(taking(known.instruction), element("td", fixed(known.distance, 2), { class: "number" }))));
  if (described.place) map.mark(...described.place, described.nearest.map((known) => known.instruction));
  return measuring;
}

function taking(instruction, label = "Instruction", kind = "") {
  const button = element("button", instruction, { type: "button", class: "take" });
  button.addEventListener("click", () => take(instruction));
  return cell(label, button, kind);
}

function showInputs(inputs) {
  const rows = inputs.map((input) => ({
    input: cell("Input", input), adapted: cell("With the adapter"), bare: cell("Bare base", "", "bare"),
    agreement: cell("Agreement", "", "number"),
  }));
  $("answers").replaceChildren(...rows.map((one) => row(one.input, one.adapted, one.bare, one.agreement)));
  return rows;
}

// All inputs in one request: the server sends each one's tokens as they come.
async function streamAnswers(model, inputs, cells, signal) {
  for (const one of cells) one.classList.add("writing");
  try {
    const body = { model, prompt: inputs, stream: true, temperature: 0, max_tokens: run.max_new_tokens };
    for await (const event of stream("/v1/completions", body, signal)) {
      for (const choice of event.choices ?? []) {
        const one = cells[choice.index];
        one.append(choice.text ?? "");
        if (!choice.finish_reason) continue;
        one.classList.remove("writing");
        if (choice.finish_reason === "length") {
          one.append(element("span", ` cut off after ${run.max_new_tokens} tokens`, { class: "cut" }));
        }
      }
    }
  } finally {
    for (const one of cells) one.classList.remove("writing");
  }
}

function showConfidence(confidence, rows) {
  rows.forEach((one, index) => one.agreement.replaceChildren(fixed(confidence.by_input[index], 2)));
  const worth = confidence.threshold === null
    ? "From where on answers are right was not measured for this run."
    : `Answers to tasks of dev were mostly right from ${fixed(confidence.threshold, 2)} on.`;
  const verdict = confidence.is_low ? "low, " : "";
  $("confidence").textContent = `${verdict}${fixed(confidence.agreement, 2)}. ${worth}`;
  $("doubt").hidden = !confidence.warning;
  $("doubt").textContent = confidence.warning ?? "";
}

async function saveAdapter() {
  if (instructionJob.isRunning) return;
  const instruction = checkedInstruction();
  if (!instruction) return;
  await instructionJob.start("Writing the adapter, and proving it with peft.", async (signal) => {
    const blob = await download("/ship/v1/export", { instruction }, signal);
    const link = element("a", "", { download: "adapter.zip" });
    link.href = URL.createObjectURL(blob);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    return `adapter.zip: ${Math.ceil(blob.size / 1024)} kB, proved with peft.`;
  }, showInstructionError);
}

function take(instruction) {
  instructionJob.cancel();
  $("instruction").value = instruction;
  $("instruction").focus({ preventScroll: true });
  $("instruction-part").scrollIntoView();
  answer();
}

// Examples -> candidates.

async function induce() {
  if (examplesJob.isRunning) return;
  forgive("examples");
  let examples;
  try {
    examples = readExamples($("examples").value);
  } catch (error) {
    if (error instanceof BadLine) return complain("examples", error.message);
    throw error;
  }
  if (!examples.length) return complain("examples", "Give at least one line: input -> target.");
  $("candidates-part").hidden = true;
  await examplesJob.start("Searching.", async (signal, say) => {
    const induced = await lastOf(stream("/ship/v1/induce", { examples }, signal), say);
    const count = (right) => (right === null ? "–" : `${right} of ${induced.num_examples}`);
    $("candidates").replaceChildren(...induced.candidates.map((one) => row(
      taking(one.instruction, "Instruction", "wide-cell"),
      cell("As adapter", count(one.num_right), "number"),
      cell("In the prompt", count(one.num_right_in_prompt), "number"),
      cell("Loss, nats", fixed(one.loss, 2), "number"))));
    $("candidates-part").hidden = false;
    return `${induced.candidates.length} candidates; the best answers ${count(induced.candidates[0].most_right)}.`;
  }, (error) => complain("examples", error.message));
}

// Lines of progress on the way are said; what comes last is the result.
async function lastOf(events, say) {
  let result = null;
  for await (const event of events) {
    if (event.progress) say(event.progress);
    if (event.result) result = event.result;
  }
  if (!result) throw new ApiError(0, { error: { message: "the server ended before it had a result" } });
  return result;
}

// Adapter -> words.

const FILES = ["adapter_config.json", "adapter_model.safetensors"];

function chosenFiles() {
  const files = [...$("files").files];
  const found = FILES.map((name) => files.find((file) => file.name === name));
  const missing = FILES.filter((_, index) => !found[index]);
  if (missing.length) return complain("files", `Choose ${missing.join(" and ")} of the adapter's folder.`);
  const tooLarge = found.find((file) => file.size > run.max_adapter_bytes);
  if (tooLarge) {
    const most = Math.floor(run.max_adapter_bytes / 2 ** 20);
    return complain("files", `${tooLarge.name} is larger than the ${most} MB that this server takes: explain it on its own machine.`);
  }
  return found;
}

async function asBase64(file, signal) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    signal.addEventListener("abort", () => reader.abort());
    reader.readAsDataURL(file);
  });
  return url.slice(url.indexOf(",") + 1);
}

async function explain() {
  if (adapterJob.isRunning || !run) return;
  forgive("files", "adapter-inputs");
  const files = chosenFiles();
  if (!files) return;
  const inputs = readTexts($("adapter-inputs").value);
  $("explanation-part").hidden = true;
  await adapterJob.start("Sending the adapter.", async (signal, say) => {
    const [config, weights] = await Promise.all(files.map((file) => asBase64(file, signal)));
    say("Reading the adapter.");
    showExplanation(await lastOf(stream("/ship/v1/explain", { config, weights, inputs }, signal), say));
    return "Explained.";
  }, (error) => complain(blamed(error, [["input", "adapter-inputs"]], "files"), error.message));
}

function showExplanation(explained) {
  $("explanation").textContent = explained.instruction ?? "None of what this run can say does this.";
  $("evidence-title").textContent = explained.evidence;
  $("evidence-hint").textContent = explained.about;
  $("explained").replaceChildren(...explained.candidates.map((one) => row(
    taking(one.instruction, "Instruction", "wide-cell"), cell(explained.evidence, one.evidence, "number"),
    cell("Found", one.origin, "word"))));
  $("explanation-part").hidden = false;
}

// The map and the run.

const map = new LatentMap($("map"), $("map-caption"), take);
const mapLead = $("map-lead").textContent;

async function showMap() {
  try {
    const plane = await get("/ship/v1/map");
    if (!plane.points.length) {
      $("map-part").hidden = true;
      return;
    }
    map.show(plane.points);
    $("map-lead").textContent = `${mapLead} The two axes hold ${Math.round(100 * plane.explained)} % of the latents’ spread.`;
    $("map-table-part").addEventListener("toggle", () => {
      $("map-rows").replaceChildren(...plane.points.map((point) => row(
        taking(point.instruction),
        element("td", fixed(point.x, 2), { class: "number" }), element("td", fixed(point.y, 2), { class: "number" }))));
    }, { once: true });
  } catch (error) {
    $("map-error").textContent = error.message;
  }
}

async function begin() {
  try {
    run = await get("/ship/v1/run");
  } catch (error) {
    if (error.status !== 401) $("run").textContent = error.message;
    return;
  }
  $("key-part").hidden = true;
  $("run").textContent = `${run.model}: ${run.kind} adapters of the base ${run.base}, trained on ${run.num_known} instructions`;
  if (!$("inputs").value) $("inputs").value = run.probes.map(writeText).join("\n");
  const [known] = run.examples;
  if (known) $("instruction").placeholder = known;
  if (!run.reads_adapters) $("adapter-part").hidden = true;
  await showMap();
}

document.addEventListener("key-needed", (event) => {
  $("key-part").hidden = false;
  $("run").textContent = "A key is needed to ask this server.";
  if (event.detail) complain("key", "The server does not take this key.");
  else $("key").focus();
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  forgive("key");
  keepKey($("key").value);
  begin();
});
$("instruction-form").addEventListener("submit", (event) => {
  event.preventDefault();
  answer();
});
$("instruction").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  answer();
});
$("download").addEventListener("click", saveAdapter);
$("examples-form").addEventListener("submit", (event) => {
  event.preventDefault();
  induce();
});
$("adapter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  explain();
});

begin();
