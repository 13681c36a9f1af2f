// Whatever a model, a file or a person wrote is put into the page as text (`textContent`), never as markup.
const KEY = "gneiss-key"; // in sessionStorage: it goes with the tab
const access = { key: sessionStorage.getItem(KEY) };
const $ = id => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const percent = share => `${(100 * share).toFixed(1)} %`;
/** The last part of a model's name. */
const short = name => name.split("/").filter(Boolean).at(-1) ?? name;

/** What each model reads of an input: the base has the hard prompt where the tuned model has its virtual tokens. */
function textsOf(task, input) {
  const tuned = task ? task.verbalizer.replace("{{input}}", () => input) : input;
  return { tuned, base: task?.hard_prompt ? `${task.hard_prompt} ${tuned}` : tuned };
}

// --- The server ---

class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: no answer, or half of one
  }
}

async function refusalOf(path, response) {
  const message = body => body?.error?.message ?? body?.errors?.[0]?.message;
  const said = await response.json().then(message, () => null) ?? response.statusText;
  const wait = response.headers.get("retry-after");
  const advice = {
    401: "This server asks for a key.",
    404: path.startsWith("/v1/") && "Not loaded any more.",
    429: `The server is busy${wait ? `; try again in ${wait} s` : "; try again"}.`,
  };
  return new Failure(response.status, [advice[response.status], said].filter(Boolean).join(" ") || `The server answered ${response.status}.`);
}

const gone = () => new Failure(0, "The server does not answer. Is it still running?");

/** Sends a request, with the key if there is one; fails if the server refuses it. */
async function send(path, options) {
  const headers = { ...options.headers, ...(access.key && { Authorization: `Bearer ${access.key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch(error => { throw options.signal?.aborted ? error : gone(); });
  if (!response.ok) throw await refusalOf(path, response);
  return response;
}

/** A request with JSON as its body, or without a body. */
const call = (path, body, signal, method = body ? "POST" : "GET") =>
  send(path, { method, signal, ...(body && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }) });

// --- What the page says of the server ---

function tell(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

function setHealth(text, kind) {
  $("health").textContent = text;
  $("health").className = `badge ${kind}`;
}

function lock() {
  setHealth("needs a key", "bad");
  $("lock-message").textContent = access.key ? "The server does not take this key." : "This server asks for a key. It stays in this tab and goes when the tab is closed.";
  sessionStorage.removeItem(KEY);
  access.key = null;
  $("lock").hidden = false;
  $("key").focus();
}

function unlock() {
  if (access.key) sessionStorage.setItem(KEY, access.key);
  $("lock").hidden = true;
}

/** Calls `next` when a person has typed a key. */
function withKey(next) {
  $("key-form").onsubmit = event => {
    event.preventDefault();
    const key = $("key").value.trim();
    // A header takes no other character.
    if (!/^[\x21-\x7e]+$/.test(key)) { $("lock-message").textContent = "Type the key: letters, digits and signs without spaces."; return; }
    access.key = key;
    $("key").value = "";
    next();
  };
}
