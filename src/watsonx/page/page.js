const QUICK = 1000; // milliseconds between two looks at the server while something goes on
const SLOW = 5000; // and otherwise
const AT_A_TIME = 4; // requests while a deployment is scored
const ENDED = ["completed", "failed", "canceled"];
const PATHS = { assets: "/v2/assets", trainings: "/ml/v4/trainings", models: "/ml/v4/models", deployments: "/ml/v4/deployments" };
const state = {
  models: [], // names of base models
  assets: [],
  runs: [], // without their metrics
  deployments: [],
  chosen: null, // the id of the run that is shown
  run: null, // that run with its metrics
  steps: [], // its steps: {step, epoch, loss}
  shown: {}, // what each list was drawn from last, as JSON
  timer: 0,
  scoring: null, // the AbortController of the scoring in progress
};

const json = async (...request) => (await call(...request)).json();
const encode = encodeURIComponent;
const idOf = record => record.metadata.id ?? record.metadata.asset_id;
const nameOf = record => record.metadata.name || idOf(record).slice(0, 8);
const stateOf = record => record.entity.status.state;
const time = text => new Date(text).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
const size = bytes => bytes < 1000 ? `${bytes} bytes` : bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
const loss = value => value < 0.01 ? value.toExponential(1) : value.toPrecision(3);

/** Whether a list changed since it was drawn last. */
function changed(name, ...values) {
  const now = JSON.stringify(values);
  const differs = state.shown[name] !== now;
  state.shown[name] = now;
  return differs;
}

/** Does something that a person asked for, with its button off, and says in `place` why it failed. */
async function act(button, work, place = $("notice")) {
  const say = text => { place.textContent = text; if (place === $("notice")) place.hidden = !text; };
  say("");
  button.disabled = true;
  try {
    await work();
    await refresh();
  } catch (error) {
    if (error.status === 401) lock();
    else say(error.message);
  }
  button.disabled = false;
}

// --- Reading ---

async function refresh() {
  clearTimeout(state.timer);
  let pause = SLOW;
  try {
    const models = await json("/ml/v1/foundation_model_specs"); // alone, as the server may ask for a key
    const [assets, runs, deployments] = await Promise.all([
      json("/v2/asset_types/data_asset/search", { query: "*:*" }), json(PATHS.trainings), json(PATHS.deployments),
    ]);
    Object.assign(state, { models: models.resources, assets: assets.results, runs: runs.resources, deployments: deployments.resources });
    if (!state.runs.some(run => idOf(run) === state.chosen)) Object.assign(state, { chosen: state.runs[0] && idOf(state.runs[0]), run: null });
    await readRun();
    if ($("health").textContent !== "ready" && !$("notice").hidden) tell("");
    setHealth("ready", "good");
    unlock();
    show();
    const waits = state.runs.some(run => !ENDED.includes(stateOf(run))) || state.deployments.some(one => stateOf(one) === "initializing");
    if (waits) pause = QUICK;
  } catch (error) {
    if (error.status === 401) return lock();
    if (!(error instanceof Failure)) throw error;
    setHealth(error.status ? "failed" : "no answer", "bad");
    tell(error.message);
  }
  clearTimeout(state.timer);
  state.timer = setTimeout(refresh, pause);
}

/** Reads the chosen run with its metrics, unless it has ended and is known. */
async function readRun() {
  const listed = state.runs.find(run => idOf(run) === state.chosen);
  if (!listed) return Object.assign(state, { run: null, steps: [] });
  if (state.run && idOf(state.run) === state.chosen && ENDED.includes(stateOf(state.run))) return;
  const run = await json(`${PATHS.trainings}/${state.chosen}`);
  if (idOf(run) !== state.chosen) return; // another one was chosen meanwhile
  const steps = new Map();
  for (const { iteration, ml_metrics } of run.entity.status.metrics ?? []) steps.set(iteration, { step: iteration + 1, epoch: ml_metrics.epoch + 1, loss: ml_metrics.loss });
  Object.assign(state, { run, steps: [...steps.values()] });
}

// --- Showing ---

function show() {
  $("content").hidden = false;
  const base = state.models[0]?.model_id ?? "";
  $("base").textContent = short(base) || "gneiss";
  $("base").title = base;
  if (changed("models", state.models)) { fill($("model"), state.models.map(({ model_id }) => [model_id, model_id])); showStandIn(); }
  const usable = state.assets.filter(asset => asset.metadata.size > 0).map(asset => [idOf(asset), nameOf(asset)]);
  if (changed("assets", state.assets)) {
    $("assets").replaceChildren(...state.assets.map(assetRow));
    fill($("data"), usable);
    fill($("score-data"), usable);
  }
  $("no-assets").hidden = state.assets.length > 0;
  if (changed("runs", state.runs, state.chosen)) showRuns();
  $("no-runs").hidden = state.runs.length > 0;
  $("runs-box").hidden = !state.runs.length;
  if (state.run && changed("run", state.run)) showRun();
  if (changed("deployments", state.deployments, state.runs.map(nameOf))) showDeployments();
}

/** Gives a choice new options, and keeps what is chosen if it is still there. */
function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, textContent]) => make("option", { value, textContent })));
  if (options.some(([value]) => value === before)) select.value = before;
}

function showStandIn() {
  const model = state.models.find(({ model_id }) => model_id === $("model").value);
  $("stand-in").textContent = model && model !== state.models[0] ? model.short_description : "";
}

/** A row of a list: a name, a note, a state and buttons. */
function row(name, note, status, ...buttons) {
  const what = make("div", { className: "what" }, make("bdi", { className: "name", textContent: name }), make("span", { className: "note", textContent: note }));
  return make("li", {}, what, ...(status ? [make("span", { className: `state ${status}`, textContent: status })] : []), make("span", { className: "buttons" }, ...buttons));
}

function removal(path, name) {
  const button = make("button", { type: "button", className: "small", textContent: "Delete", ariaLabel: `Delete ${name}` });
  button.onclick = () => confirm(`Delete ${name}?`) && act(button, () => call(path, null, null, "DELETE"));
  return button;
}

function assetRow(asset) {
  const { size: bytes, created_at } = asset.metadata;
  return row(nameOf(asset), `${bytes ? size(bytes) : "no content"}, ${time(created_at)}`, "", removal(`${PATHS.assets}/${idOf(asset)}`, nameOf(asset)));
}

function showRuns() {
  $("runs").replaceChildren(...state.runs.map(run => {
    const button = make("button", { type: "button", ariaPressed: idOf(run) === state.chosen, onclick: () => choose(idOf(run)) });
    button.append(make("bdi", { textContent: nameOf(run) }), make("span", { className: `state ${stateOf(run)}`, textContent: stateOf(run) }), make("span", { className: "note", textContent: time(run.metadata.created_at) }));
    return make("li", {}, button);
  }));
}

async function choose(id) {
  Object.assign(state, { chosen: id, run: null, steps: [] });
  await refresh();
}

function showRun() {
  const { run, steps } = state;
  const status = stateOf(run);
  const { prompt_tuning: tuning, model_id } = run.entity;
  $("run-name").textContent = nameOf(run);
  Object.assign($("run-state"), { textContent: status, className: `state ${status}` });
  $("run-failure").textContent = status === "failed" ? run.entity.status.message?.text ?? "" : "";
  showProgress(tuning.num_epochs, status);
  drawCurve();
  $("warnings").replaceChildren(...(run.system?.warnings ?? []).map(({ message }) => make("li", { textContent: message })));
  $("deploy").hidden = !model_id;
  if (changed("deploy", idOf(run))) $("deploy-name").value = nameOf(run);
  $("cancel").hidden = ENDED.includes(status);
  $("delete-run").hidden = !ENDED.includes(status);
  const facts = { "Base model": tuning.base_model.model_id, Steps: steps.length || "none yet", Started: run.entity.status.running_at && time(run.entity.status.running_at), Ended: run.entity.status.completed_at && time(run.entity.status.completed_at) };
  for (const [key, value] of Object.entries(tuning)) if (typeof value !== "object") facts[key] = value;
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value !== undefined).map(([key, value]) =>
    make("div", { className: String(value).length > 24 ? "long" : "" }, make("dt", { textContent: key }), make("dd", {}, make("bdi", { textContent: value })))));
}

/** How far a run is. The number of steps of an epoch is known when the first epoch has ended. */
function showProgress(epochs, status) {
  const { steps } = state;
  const last = steps.at(-1);
  const perEpoch = steps.filter(step => step.epoch === 1).length;
  const share = status === "completed" ? 1 : last && last.epoch > 1 ? steps.length / (perEpoch * epochs) : 0;
  const width = `${100 * Math.min(share, 1)}%`;
  $("progress").querySelector("i").style.width = width;
  $("progress").ariaValueNow = Math.round(100 * share);
  const waiting = { pending: "waits for the device", running: "prepares the data", canceled: "no step" }[status] ?? "";
  $("progress").lastElementChild.textContent = last ? `epoch ${last.epoch} of ${epochs}, step ${last.step}, loss ${loss(last.loss)}` : waiting;
}

function showDeployments() {
  const { deployments } = state;
  $("deployments").replaceChildren(...deployments.map(one => {
    const name = servedName(one);
    const note = one.entity.status.failure?.errors?.[0]?.message ?? `${name}, ${time(one.metadata.created_at)}`;
    const ready = stateOf(one) === "ready";
    const link = make("a", { className: "button", href: `/try#${encode(name)}`, textContent: "Try", ariaLabel: `Try ${nameOf(one)}` });
    return row(nameOf(one), note, stateOf(one), ...(ready ? [link] : []), removal(`${PATHS.deployments}/${idOf(one)}`, nameOf(one)));
  }));
  const ready = deployments.filter(one => stateOf(one) === "ready");
  fill($("score-deployment"), ready.map(one => [servedName(one), nameOf(one)]));
  $("score").hidden = !ready.length;
  $("no-deployments").hidden = deployments.length > 0;
}

const servedName = deployment => deployment.entity.online?.parameters?.serving_name ?? idOf(deployment);

// --- The learning curve ---

const svg = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

/** At most five round numbers from `low` to `high`, and the space between them. */
function ticks(low, high) {
  const raw = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const space = [1, 2, 5, 10].map(factor => factor * power).find(step => step >= raw);
  const first = Math.ceil(low / space - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / space + 1e-9) - first + 1) }, (_, i) => (first + i) * space);
}

function epochMeans(steps) {
  const epochs = Map.groupBy(steps, step => step.epoch);
  return [...epochs.values()].map(group => ({
    step: (group[0].step + group.at(-1).step) / 2, loss: group.reduce((sum, { loss }) => sum + loss, 0) / group.length,
  }));
}

function drawCurve() {
  const { steps } = state;
  const plot = $("plot");
  const width = plot.clientWidth;
  if (!steps.length) return plot.replaceChildren(make("p", { className: "none waiting", textContent: "No step yet." }));
  const [left, right, top, bottom, height] = [46, 12, 12, 26, 240];
  const highest = Math.max(...steps.map(({ loss }) => loss));
  const lowest = Math.min(0, ...steps.map(({ loss }) => loss));
  const last = Math.max(steps.at(-1).step, 2);
  const x = step => left + (width - left - right) * (step - 1) / (last - 1);
  const y = value => top + (height - top - bottom) * (1 - (value - lowest) / (highest - lowest || 1));
  const path = points => points.map(({ step, loss }, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  const means = epochMeans(steps);
  const label = `Loss of ${steps.length} steps: ${loss(steps[0].loss)} at first, ${loss(steps.at(-1).loss)} at last`;
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const value of ticks(lowest, highest)) {
    const text = svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, String(+value.toPrecision(3)));
    picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), text);
  }
  for (const step of ticks(1, last).filter(Number.isInteger)) picture.append(svg("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, String(step)));
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  picture.append(
    svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    svg("path", { class: "each", d: path(steps) }), svg("path", { class: "mean", d: path(means) }),
    ...means.map(({ step, loss }) => svg("circle", { class: "dot", cx: x(step), cy: y(loss), r: means.length > 40 ? 1.5 : 3 })), cursor,
  );
  picture.onpointermove = event => {
    const share = (event.clientX - picture.getBoundingClientRect().left - left) / (width - left - right);
    const nearest = steps[Math.min(steps.length - 1, Math.max(0, Math.round(share * (last - 1))))];
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(nearest.step));
    cursor.setAttribute("visibility", "visible");
    $("readout").textContent = `step ${nearest.step}, epoch ${nearest.epoch}: ${loss(nearest.loss)}`;
  };
  picture.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); $("readout").textContent = ""; };
  plot.replaceChildren(picture);
}

// --- What a person does ---

async function upload() {
  const file = $("file").files[0];
  if (!file) throw new Failure(-1, "Choose a file first.");
  const made = await json(PATHS.assets, { metadata: { name: file.name, asset_type: "data_asset", asset_category: "USER" }, entity: { data_asset: { mime_type: file.type } } });
  const id = made.metadata.asset_id;
  try {
    const { attachment_id, url1 } = await json(`${PATHS.assets}/${id}/attachments`, { asset_type: "data_asset", name: file.name, mime: file.type });
    await send(url1, { method: "PUT", body: file });
    await call(`${PATHS.assets}/${id}/attachments/${attachment_id}/complete`, {});
  } catch (error) {
    await call(`${PATHS.assets}/${id}`, null, null, "DELETE").catch(() => {}); // the first error says more
    throw error;
  }
  $("upload").reset();
  state.newest = id;
}

/** The first field of the form with a wrong value. */
const wrongField = form => [...form.elements].find(field => field.willValidate && !field.validity.valid);

async function start() {
  const wrong = wrongField($("start"));
  if (wrong) {
    wrong.focus();
    throw new Failure(-1, `${wrong.labels[0].firstChild.textContent.trim().replace(/:$/, "")}: ${wrong.validationMessage}`);
  }
  if (!$("data").value) throw new Failure(-1, "Upload a file with examples first.");
  const number = id => Number($(id).value);
  const text = $("init-text").value.trim();
  const run = await json(PATHS.trainings, {
    name: $("name").value, auto_update_model: true, tags: ["prompt_tuning"],
    training_data_references: [{ type: "data_asset", location: { id: $("data").value } }],
    prompt_tuning: {
      base_model: { model_id: $("model").value }, task_id: $("task").value, tuning_type: "prompt_tuning",
      verbalizer: $("verbalizer").value, ...(text ? { init_method: "text", init_text: text } : { init_method: "random" }),
      num_epochs: number("num-epochs"), learning_rate: number("learning-rate"), batch_size: number("batch-size"), accumulate_steps: number("accumulate-steps"),
      max_input_tokens: number("max-input-tokens"), max_output_tokens: number("max-output-tokens"),
    },
  });
  Object.assign(state, { chosen: idOf(run), run: null, steps: [] });
  await refresh();
  $("runs-title").scrollIntoView({ block: "start" });
}

/** A name for addresses that no deployment has. */
function servingName(name) {
  const plain = name.toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "_").replace(/^_+|_+$/g, "").slice(0, 30) || "prompt";
  const taken = new Set([...state.deployments.map(servedName), ...state.models.map(({ model_id }) => model_id)]);
  return [plain, ...Array.from({ length: taken.size + 1 }, (_, i) => `${plain}_${i + 2}`)].find(one => !taken.has(one));
}

async function deploy() {
  const name = $("deploy-name").value.trim() || nameOf(state.run);
  await call(PATHS.deployments, { name, asset: { id: state.run.entity.model_id }, online: { parameters: { serving_name: servingName(name) } } });
}

$("upload").onsubmit = event => { event.preventDefault(); act($("upload-button"), upload).then(() => { if (state.newest) $("data").value = state.newest; state.newest = null; }); };
$("start").onsubmit = event => { event.preventDefault(); act($("start-button"), start, $("refusal")); };
$("deploy").onsubmit = event => { event.preventDefault(); act(event.submitter ?? $("deploy").lastElementChild, deploy, $("run-failure")); };
$("cancel").onclick = () => act($("cancel"), () => call(`${PATHS.trainings}/${state.chosen}`, null, null, "DELETE"), $("run-failure"));
$("delete-run").onclick = () => confirm(`Delete the run ${nameOf(state.run)}? What is deployed stays.`)
  && act($("delete-run"), () => call(`${PATHS.trainings}/${state.chosen}?hard_delete=true`, null, null, "DELETE"), $("run-failure"));
$("model").onchange = showStandIn;
new ResizeObserver(() => { if (state.run) drawCurve(); }).observe($("plot"));

// --- Scoring ---

/** The examples of a data asset, as the server reads them for a run of this task. */
const examplesOf = async (id, task) => (await json(`${PATHS.assets}/${id}/examples?task=${encode(task)}`)).examples;

/** Of which of these examples a prompt has learned, in words: a score on them says little about new texts. */
async function learnedOf(model, asset, task, examples) {
  try {
    const { entity } = await json(`${PATHS.models}/${model}`);
    const { id, href } = entity.training_data_references?.[0]?.location ?? {};
    const own = id ?? href?.split("/assets/").at(-1).split("?")[0];
    if (!own) throw new Failure(-1, "the model does not name its data.");
    const seen = new Set(own === asset ? examples.map(({ input }) => input) : (await examplesOf(own, task)).map(({ input }) => input));
    const count = examples.filter(({ input }) => seen.has(input)).length;
    const which = count === examples.length ? "these examples" : `${count} of these ${examples.length} examples`;
    return count ? `This prompt was tuned on ${which}: the score says how well it has learned them, and little about new texts.` : "";
  } catch (error) {
    if (error.status === 401 || !error.status) throw error;
    return `It is not known whether this prompt was tuned on some of these examples: ${error.message}`;
  }
}

/** The share of right answers of the tuned prompt and of the base model, which reads the instruction in place of the virtual tokens. */
async function score() {
  const controller = state.scoring = new AbortController();
  const { tasks } = await json("/v1/tasks");
  const [asset, name] = [$("score-data").value, $("score-deployment").value];
  const prompt = tasks.find(({ model }) => model === name);
  const deployment = state.deployments.find(one => servedName(one) === name);
  if (!prompt || !deployment) throw new Failure(-1, "This deployment is not loaded any more.");
  const { task, max_output_tokens } = prompt.task;
  const examples = await examplesOf(asset, task);
  $("score-note").textContent = await learnedOf(deployment.entity.asset.id, asset, task, examples);
  const right = { tuned: 0, base: 0 };
  let [next, done] = [0, 0];
  const ask = async (model, input) => (await json("/v1/completions", { model, prompt: input, max_tokens: max_output_tokens, temperature: 0 }, controller.signal)).choices[0].text.trim();
  const work = async () => {
    for (let i = next++; i < examples.length; i = next++) {
      const { input, output } = examples[i];
      const texts = textsOf(prompt.task, input);
      const [tuned, base] = await Promise.all([ask(prompt.model, texts.tuned), ask(prompt.base, texts.base)]);
      right.tuned += tuned === output.trim();
      right.base += base === output.trim();
      done += 1;
      showScores(right, done, examples.length);
    }
  };
  await Promise.all(Array.from({ length: AT_A_TIME }, work));
}

function showScores(right, done, all) {
  const tile = (name, value) => make("div", {}, make("span", { textContent: name }), make("strong", { textContent: value }));
  $("scores").replaceChildren(tile("Accuracy, tuned", percent(right.tuned / done)), tile("Accuracy, base", percent(right.base / done)), tile("Examples", done < all ? `${done} of ${all}` : String(all)));
  $("scores").hidden = false;
}

$("score").onsubmit = event => {
  event.preventDefault();
  $("scores").hidden = true;
  $("score-note").textContent = "";
  $("score-stop").disabled = false;
  act($("score-button"), () => score().catch(error => { if (!state.scoring?.signal.aborted) throw error; }), $("score-refusal"))
    .then(() => { $("score-stop").disabled = true; });
};
$("score-stop").onclick = () => state.scoring?.abort();

withKey(refresh);
addEventListener("focus", refresh);
refresh();
