// The page of `regctl serve`: the registry, live from one event stream, and its history.
//
// Whatever is registered is text: it reaches the document through `textContent` only.

const SHOWN_MAX = 10_000;
const FIRST_ROWS = 200; // in the first frame; each later frame has four times as many as the one before
const BODY_ROWS = 100; // of a `tbody`
const MANY_ROWS = 300; // with more rows, layout and screen readers leave out those that are out of sight
const MARK_MS = 4_000; // how long a row that was added, changed or removed is marked
const RETRY_MS = 1_000;
const POLL_MS = 2_000; // between two reads of the daemon's figures
const ASK_MS = 4_000; // the gateway itself answers within 2 s
const SILENCE_MS = 45_000; // then the stream counts as dead, since it has an event every 30 s
const HISTORY_MS = 1_000; // between two reads of the history
const HISTORY_PAGE = 100;
const HISTORY_MAX = 1_000;
const LOOPBACK = ["127.0.0.1", "::1", "localhost"];
const STATES = ["starting", "draining", "ready"]; // in this order when sorted by state

const $ = (id) => document.getElementById(id);

// Texts.

const UNPRINTABLE = /[\p{C}\p{Z}]/gu;

/** Escape control characters, as `regctl` does: some of them change the direction of a text. */
function visible(text) {
  return String(text).replace(UNPRINTABLE, (letter) => {
    if (letter === " ") return letter;
    const digits = letter.codePointAt(0).toString(16);
    return digits.length > 4 ? `\\u{${digits}}` : `\\u${digits.padStart(4, "0")}`;
  });
}

/** Create an element with a text or child nodes. */
function make(tag, className = "", ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content); // a string becomes a text node
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A duration with its two largest units. */
function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} m`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const two = (number) => String(number).padStart(2, "0");
const clock = (date) => [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(":");
const day = (date) => [date.getFullYear(), date.getMonth() + 1, date.getDate()].map(two).join("-");
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const dateAndTime = (date) => `${day(date)} ${clock(date)}`;

/** The time for a narrow column: without the day if it is today, else without the seconds. */
function shortTime(date) {
  if (day(date) === day(new Date())) return clock(date);
  return `${MONTHS[date.getMonth()]} ${date.getDate()} ${clock(date).slice(0, 5)}`;
}

function timeElement(unixSeconds, format) {
  const date = new Date(unixSeconds * 1000);
  const element = make("time", "", format(date));
  if (Number.isFinite(date.getTime())) element.dateTime = date.toISOString();
  element.title = dateAndTime(date);
  return element;
}

const hostPort = (host, port) => (host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`);
const fullName = (name, instance) => (instance ? `${name}/${instance}` : name);
const keyOf = (fields) => `${fields.name}/${fields.instance}`; // a name has no slash

function heldBy(fields) {
  const owners = [];
  if (fields.pid !== undefined) owners.push(`pid ${fields.pid}`);
  if (fields.hold) owners.push("connection");
  if (fields.ttl !== undefined) owners.push(`ttl ${fields.ttl} s`);
  return owners.join(", ") || "static";
}

function stateText(fields) {
  return fields.priority ? `${fields.state}, priority ${fields.priority}` : fields.state;
}

function nameNodes(name, instance) {
  return instance ? [visible(name), make("span", "instance", `/${visible(instance)}`)] : [visible(name)];
}

/** Return the URL of an instance, the same as in a redirect of the gateway; null if a browser cannot open it. */
function urlOf({ name, host, port, meta }) {
  const scheme = ["http", "https"].includes(meta.scheme) ? meta.scheme : "http";
  const named = LOOPBACK.includes(host.toLowerCase()) ? `${name}.localhost` : host.replace("%", "%25");
  try {
    return new URL(`${scheme}://${hostPort(named, port)}/`).href;
  } catch {
    return null;
  }
}

function link(href, text) {
  const element = make("a", "", text);
  element.href = href;
  return element;
}

// Questions to the gateway.

/** Return the reply to a command. Throws an Error whose message is for people. */
async function ask(path) {
  let response;
  try {
    response = await fetch(path, { signal: AbortSignal.timeout(ASK_MS) });
  } catch (error) {
    if (error.name !== "TimeoutError") throw new Error(`regctl serve does not answer at ${location.host}.`);
    const why = "A browser opens six connections to a host: if this page is open in six windows, close one.";
    throw Object.assign(new Error(`No answer from ${location.host}. ${why}`), { isTimeout: true });
  }
  const reply = await response.json();
  if (!response.ok) throw new Error(reply.message);
  return reply;
}

// The table of services.

const rows = new Map(); // by key
const marked = new Map(); // row: when its mark ends
const changed = new Set(); // rows that are not drawn yet
let shown = []; // the rows in the table, in its order
let shownOf = 0; // the rows that match the filter
let drawAll = true;
let isStale = false; // other rows may belong among the first ones by now
let rowsMax = FIRST_ROWS;
let words = [];
let order = { column: "name", descending: false };
let currentRow = null; // the row that Tab reaches

/** A registration and, once it is shown, its elements. */
class Row {
  constructor() {
    this.element = null;
    this.details = null;
    this.gone = ""; // the reason why it ended
    this.isPlaced = false;
    this.isDrawn = false; // the elements show the current data
  }

  set(data) {
    this.data = data;
    this.isDrawn = false;
    this.gone = "";
    this.held = heldBy(data);
    this.meta = Object.entries(data.meta).map(([key, value]) => `${key}=${value}`);
    this.address = hostPort(data.host, data.port);
    const texts = [fullName(data.name, data.instance), this.address, stateText(data), this.held, ...this.meta];
    this.words = texts.join(" ").toLowerCase();
  }

  matches() {
    return words.every((word) => this.words.includes(word));
  }

  /** Make the elements show the current data. The first call creates them. */
  draw(now) {
    if (!this.element) this.create();
    this.isDrawn = true;
    if (marked.has(this)) this.element.dataset.mark = this.kind;
    const { data } = this;
    this.button.replaceChildren(...nameNodes(data.name, data.instance));
    this.button.title = fullName(data.name, data.instance);
    const url = this.gone ? null : urlOf(data);
    const address = url ? link(url, visible(this.address)) : make("span", "", visible(this.address));
    address.title = url ?? visible(this.address);
    address.tabIndex = url && this === currentRow ? 0 : -1;
    this.addressCell.replaceChildren(address);
    setText(this.stateText, visible(this.gone || stateText(data)));
    this.stateText.title = this.stateText.textContent;
    this.stateText.dataset.state = this.gone ? "gone" : data.state;
    const date = new Date(data.registered_at * 1000);
    if (Number.isFinite(date.getTime())) this.time.dateTime = date.toISOString();
    this.time.title = dateAndTime(date);
    this.drawAge(now);
    setText(this.heldCell, visible(this.held));
    this.heldCell.title = this.heldCell.textContent;
    this.metaCell.replaceChildren(...this.meta.map((label) => make("bdi", "label", visible(label))));
    this.metaCell.title = this.meta.map(visible).join("\n");
  }

  drawAge(now) {
    const age = duration(now / 1000 - this.data.registered_at);
    if (this.gone || age === this.age) return;
    this.age = age;
    this.time.textContent = age;
  }

  create() {
    const cell = (className, ...content) => {
      const element = make("td", className, ...content);
      element.setAttribute("role", "cell");
      return element;
    };
    this.button = make("button");
    this.button.tabIndex = -1;
    this.button.setAttribute("aria-expanded", "false");
    const name = make("th", "name", this.button);
    name.scope = "row";
    name.setAttribute("role", "rowheader");
    this.addressCell = cell("address");
    this.stateText = make("span");
    this.time = make("time");
    this.heldCell = cell("held");
    this.metaCell = cell("meta");
    this.element = make("tr", "", name, this.addressCell, cell("state", this.stateText), cell("since", this.time));
    this.element.append(this.heldCell, this.metaCell);
    this.element.setAttribute("role", "row");
    rowOf.set(this.element, this);
  }

  mark(kind) {
    this.kind = kind;
    marked.set(this, Date.now() + MARK_MS);
  }
}

const rowOf = new WeakMap(); // element: row

const compareText = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const DIGITS = /^\d+$/;

function compareKeys(a, b) {
  const byName = compareText(a.data.name, b.data.name);
  if (byName) return byName;
  const [one, other] = [a.data.instance, b.data.instance];
  const [isNumber, isOther] = [DIGITS.test(one), DIGITS.test(other)];
  if (isNumber !== isOther) return isNumber ? -1 : 1;
  return (isNumber && one.length - other.length) || compareText(one, other); // 9 before 10
}

const COMPARE = {
  name: compareKeys,
  address: (a, b) => compareText(a.data.host, b.data.host) || a.data.port - b.data.port,
  state: (a, b) => STATES.indexOf(a.data.state) - STATES.indexOf(b.data.state),
  since: (a, b) => b.data.registered_at - a.data.registered_at, // the youngest first
  held: (a, b) => compareText(a.held, b.held),
  meta: (a, b) => compareText(a.meta.join(" "), b.meta.join(" ")),
};

function compare(a, b) {
  const result = COMPARE[order.column](a, b);
  return (order.descending ? -result : result) || compareKeys(a, b);
}

let isScheduled = false;

function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    draw();
  });
}

function draw() {
  const focused = document.activeElement;
  if (drawAll || changed.size > BODY_ROWS) {
    drawTable();
  } else if (shownOf > shown.length) {
    const now = Date.now();
    for (const row of changed) if (row.isPlaced) row.draw(now);
    isStale ||= changed.size > 0; // choosing the first rows again at every change would be too much work
  } else if (changed.size) {
    drawChanged();
  }
  changed.clear();
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  if (!currentRow?.isPlaced) setCurrent(shown[0] ?? null);
  drawCounts();
  drawHistory();
}

function drawTable() {
  const matching = [...rows.values()].filter((row) => row.matches()).sort(compare);
  shownOf = matching.length;
  for (const row of shown) row.isPlaced = false;
  shown = matching.slice(0, rowsMax);
  const now = Date.now();
  for (const row of shown) {
    row.isPlaced = true;
    if (!row.isDrawn) row.draw(now);
  }
  arrangeBodies(shown);
  drawAll = shownOf > rowsMax && rowsMax < SHOWN_MAX;
  isStale = false;
  if (!drawAll) return;
  rowsMax = Math.min(4 * rowsMax, SHOWN_MAX);
  schedule();
}

function arrangeBodies(all) {
  const table = $("services");
  table.classList.toggle("many", all.length > MANY_ROWS);
  const count = Math.max(1, Math.ceil(all.length / BODY_ROWS));
  while (table.tBodies.length > count) table.tBodies[count].remove();
  while (table.tBodies.length < count) table.createTBody().setAttribute("role", "rowgroup");
  [...table.tBodies].forEach((body, index) => {
    const part = all.slice(index * BODY_ROWS, (index + 1) * BODY_ROWS);
    arrange(body, part.flatMap((row) => (row.details ? [row.element, row.details] : [row.element])));
  });
}

/** Make these elements the children of a parent. Move as few as possible, since a moved element loses the focus. */
function arrange(parent, elements) {
  const unwanted = new Set(parent.children);
  for (const element of elements) unwanted.delete(element);
  for (const element of unwanted) element.remove();
  let next = parent.firstElementChild;
  for (const element of elements) {
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
}

/** Draw the changed rows and put each where it belongs. */
function drawChanged() {
  shown = shown.filter((row) => !changed.has(row)); // the unchanged rows are in order
  for (const row of changed) {
    if (rows.get(keyOf(row.data)) === row && row.matches()) {
      row.draw(Date.now());
      insert(row);
    } else if (row.isPlaced) {
      row.element.remove();
      row.details?.remove();
      row.isPlaced = false;
    }
  }
  shownOf = shown.length;
}

function insert(row) {
  let [low, high] = [0, shown.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (compare(shown[middle], row) < 0) low = middle + 1;
    else high = middle;
  }
  const next = shown[low]?.element ?? null;
  shown.splice(low, 0, row);
  if (row.isPlaced && elementAfter(row) === next) return;
  if (next) next.before(row.element);
  else [...$("services").tBodies].at(-1).append(row.element);
  if (row.details) row.element.after(row.details);
  row.isPlaced = true;
}

function elementAfter(row) {
  const last = row.details ?? row.element;
  return last.nextElementSibling ?? last.parentElement.nextElementSibling?.firstElementChild ?? null;
}

function drawCounts() {
  let leaving = 0;
  for (const row of marked.keys()) if (row.gone) leaving += 1;
  const all = rows.size - leaving; // the registered rows
  const number = (count) => count.toLocaleString("en");
  setText($("registrations"), number(all));
  const isFiltered = words.length > 0;
  setText($("count"), !isSynced ? "" : isFiltered ? `${number(shownOf)} of ${number(all)}` : number(all));
  $("empty").hidden = shown.length > 0 || !isSynced;
  $("services").hidden = shown.length === 0;
  const how = "Nothing is registered. To begin: regctl register db 5432";
  setText($("empty"), isFiltered && all ? "No service matches the filter." : how);
  $("more").hidden = shownOf <= SHOWN_MAX;
  setText($("more"), `These are the first ${number(SHOWN_MAX)} of ${number(shownOf)}. The filter finds the others.`);
}

/** Remove the marks that have ended, and the rows whose registration ended; count the seconds. */
function tick() {
  const now = Date.now();
  for (const [row, end] of marked) {
    if (end > now) continue;
    marked.delete(row);
    if (row.element) delete row.element.dataset.mark;
    if (!row.gone) continue;
    if (rows.get(keyOf(row.data)) === row) rows.delete(keyOf(row.data));
    changed.add(row);
    schedule();
  }
  for (const row of shown) row.drawAge(now);
  if (!isStale) return;
  drawAll = true;
  schedule();
}

// The keyboard: Tab reaches one row, the arrow keys reach the other rows, and / the filter.

function setCurrent(row) {
  if (row === currentRow) return;
  for (const [each, index] of [[currentRow, -1], [row, 0]]) {
    if (!each?.element) continue;
    each.button.tabIndex = index;
    const address = each.addressCell.querySelector("a");
    if (address) address.tabIndex = index;
  }
  currentRow = row;
}

function moveFocus(event) {
  const row = rowOf.get(event.target.closest("tr"));
  const index = shown.indexOf(row);
  const last = shown.length - 1;
  const targets = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: last };
  if (index < 0 || !(event.key in targets)) return;
  event.preventDefault();
  const target = shown[Math.min(last, Math.max(0, targets[event.key]))];
  target.button.focus();
}

// Details: what `why` says about a row.

async function toggleDetails(row) {
  if (row.details) {
    row.details.remove();
    row.details = null;
    row.button.setAttribute("aria-expanded", "false");
    return;
  }
  const cell = make("td");
  cell.colSpan = 6;
  cell.setAttribute("role", "cell");
  row.details = make("tr", "details", cell);
  row.details.setAttribute("role", "row");
  row.button.setAttribute("aria-expanded", "true");
  await drawDetails(row);
  if (row.details && row.isPlaced) row.element.after(row.details);
}

async function drawDetails(row) {
  const { name, instance } = row.data;
  const query = new URLSearchParams({ name, instance });
  let content;
  try {
    content = detailsOf(row.data, await ask(`/v1/why?${query}`));
  } catch (error) {
    content = make("p", "", visible(error.message));
  }
  row.details?.firstElementChild.replaceChildren(content);
}

function detailsOf(data, why) {
  const list = make("dl");
  const add = (term, ...content) => {
    list.append(make("div", "", make("dt", "", term), ...content.map((node) => make("dd", "", node))));
  };
  const [entry] = why.instances;
  if (entry) {
    add("Address", visible(hostPort(entry.host, entry.port)));
    add("Held by", ...entry.owners.map(ownerText), ...(entry.more_owners ? ["and more"] : []));
    if (!entry.alive) add("", "The holder is gone; waiting for it to come back.");
    const named = new URL(location.href);
    named.hash = "";
    named.hostname = `${data.name}.localhost`;
    if (named.hostname === `${data.name}.localhost`) add("Named URL", link(named.href, named.href));
    add("Registered", make("span", "", timeElement(entry.since, dateAndTime), `, revision ${entry.rev}`));
    add("Last probe", probeText(entry.probe));
  }
  const labels = Object.entries(data.meta);
  if (labels.length) add("Meta", ...labels.map(([key, value]) => make("bdi", "", visible(`${key}=${value}`))));
  const left = why.departures.map(({ reason, age_s }) => `${visible(reason)}, ${duration(age_s)} ago`);
  if (left.length) add("Ended before", ...left.reverse());
  return list;
}

function ownerText(owner) {
  if (owner.static) return "nobody: it is static, and stays until it is deregistered";
  const parts = [];
  if ("connection" in owner) parts.push(owner.connection ? `connection ${owner.connection}` : "a lost connection");
  if ("pid" in owner) parts.push(`process ${owner.pid}`);
  if ("ttl" in owner) parts.push(`renewals within ${owner.ttl} s`);
  if (owner.withdrawn) parts.push("withdrawn");
  return visible(parts.join(", "));
}

function probeText(probe) {
  if (!probe) return "none: no program has waited for it";
  return `${probe.accepted ? "accepted" : visible(probe.why ?? "failed")}, ${duration(probe.age_s)} ago`;
}

// The history: pages of `/v1/history`, and later changes from the stream. Each change has its own revision, so no
// change is in the history twice.

const history = new Map(); // revision: change
const historyRows = new Map(); // change: element
let historyTimer = 0;
let historyIsOpen = true; // older changes may exist
let historyIsNew = true;

function addChange(fields) {
  history.set(fields.rev, fields);
  historyIsNew = true;
}

/** Read the latest changes. Unlike the stream, the reply says at what time and by whom each was made. */
async function readHistory(query = `limit=${HISTORY_PAGE}`) {
  const { changes, next } = await ask(`/v1/history?${query}`);
  const oldest = Math.min(...history.keys());
  for (const change of changes) addChange(change);
  if (!(changes[0]?.rev >= oldest)) historyIsOpen = next !== undefined;
  if (changes.length === 0 && history.size === 0) historyIsOpen = false;
  drawAllHistory();
}

function drawAllHistory() {
  historyIsNew = true;
  schedule();
}

function readHistorySoon() {
  if (historyTimer) return;
  historyTimer = setTimeout(async () => {
    historyTimer = 0;
    try {
      await readHistory();
    } catch {
      // The next change or the next `sync` reads again.
    }
  }, HISTORY_MS);
}

async function readOlder() {
  $("older").disabled = true;
  try {
    await readHistory(`limit=${HISTORY_PAGE}&before=${Math.min(...history.keys())}`);
  } catch {
    // The notice says that the daemon is away.
  } finally {
    $("older").disabled = false;
  }
}

function drawHistory() {
  if (!historyIsNew) return;
  historyIsNew = false;
  const revisions = [...history.keys()].sort((a, b) => b - a);
  for (const revision of revisions.splice(HISTORY_MAX)) history.delete(revision);
  const changes = revisions.map((revision) => history.get(revision));
  const matching = changes.filter((change) => words.every((word) => changeWords(change).includes(word)));
  const elements = matching.map((change) => {
    if (!historyRows.has(change)) historyRows.set(change, changeRow(change));
    return historyRows.get(change);
  });
  const kept = new Set(changes);
  for (const change of historyRows.keys()) if (!kept.has(change)) historyRows.delete(change);
  arrange($("history").tBodies[0], elements);
  $("history").classList.toggle("many", elements.length > MANY_ROWS);
  $("history").hidden = elements.length === 0;
  $("no-history").hidden = elements.length > 0;
  $("older").hidden = !historyIsOpen || history.size === 0 || history.size >= HISTORY_MAX;
}

function changeWords(change) {
  const { name, instance, host, port, op, reason = "" } = change;
  return [fullName(name, instance), hostPort(host, port), op, reason, change.state, byText(change)].join(" ").toLowerCase();
}

function byText({ by }) {
  if (!by) return "";
  const parts = [];
  if (by.command) parts.push(by.command);
  if (by.pid !== undefined) parts.push(`pid ${by.pid}`);
  if (by.uid !== undefined) parts.push(`user ${by.uid}`);
  return parts.join(", ");
}

function changeRow(change) {
  const { op, name, instance, host, port, reason } = change;
  const what = op === "down" ? reason : stateText(change);
  const row = make("tr");
  const add = (className, ...content) => {
    const cell = make("td", className, ...content);
    cell.setAttribute("role", "cell");
    row.append(cell);
  };
  row.setAttribute("role", "row");
  row.dataset.rev = change.rev;
  add("time", timeElement(change.at, shortTime));
  add("op", make("span", op === "up" || op === "down" ? op : "change", visible(op)), ` ${visible(what ?? "")}`);
  add("name", ...nameNodes(name, instance));
  add("address", visible(hostPort(host, port)));
  add("by", visible(byText(change)));
  return row;
}

// The stream.

let source = null;
let position = ""; // EPOCH-REV, where the stream resumes
let snapshot = null; // the rows since `reset`, until `sync`
let isSynced = false; // the first state is complete
let isLive = false;
let isAnswering = true;
let lostAt = 0;
let problem = "";
let isRetrying = false;
let eventAt = 0; // when the last event came

function openStream() {
  if (source || document.hidden) return;
  let url = "/v1/watch";
  if (position) {
    const [epoch, since] = [position.slice(0, position.lastIndexOf("-")), position.slice(position.lastIndexOf("-") + 1)];
    url += `?${new URLSearchParams({ epoch, since })}`;
  }
  source = new EventSource(url);
  for (const kind of ["reset", "up", "change", "down", "sync", "progress"]) source.addEventListener(kind, take);
  source.onerror = streamEnded;
}

function closeStream() {
  source?.close();
  source = null;
  isLive = false;
  snapshot = null;
}

function streamEnded() {
  closeStream();
  lostAt ||= Date.now();
  drawConnection();
  retry();
}

/** Open the stream again as soon as the daemon answers. */
async function retry() {
  if (isRetrying) return;
  isRetrying = true;
  while (!source && !document.hidden) {
    const [answers] = await Promise.all([poll(), new Promise((done) => setTimeout(done, RETRY_MS))]);
    if (answers) openStream();
  }
  isRetrying = false;
}

function take({ type, data, lastEventId }) {
  const fields = JSON.parse(data);
  eventAt = Date.now();
  if (lastEventId || type === "reset") position = lastEventId;
  if (type === "reset") {
    snapshot = new Map();
    isLive = false;
  } else if (type === "sync" || type === "progress") {
    if (snapshot) takeSnapshot();
    becomeLive();
  } else if (snapshot) {
    if (type === "down") snapshot.delete(keyOf(fields));
    else snapshot.set(keyOf(fields), fields);
  } else {
    takeChange(type, fields);
  }
}

function becomeLive() {
  if (isLive) return;
  isLive = isSynced = true;
  lostAt = 0;
  drawConnection();
  schedule();
  readHistory().catch(() => {});
}

/** Replace the state by a snapshot, and mark only the rows that differ. */
function takeSnapshot() {
  history.clear(); // changes may be missing between the known ones and the next
  for (const [key, row] of rows) if (!snapshot.has(key) && !row.gone) remove(row, "gone");
  for (const [key, fields] of snapshot) {
    if (rows.get(key)?.data.rev !== fields.rev || rows.get(key).gone) upsert(key, fields);
  }
  snapshot = null;
}

function takeChange(type, fields) {
  const key = keyOf(fields);
  const row = rows.get(key);
  if (type === "down") {
    if (row && !row.gone) remove(row, fields.reason);
  } else {
    upsert(key, fields);
  }
  const { host = "?", port = 0, state = "", priority } = rows.get(key)?.data ?? {};
  const { rev, name, instance, reason } = fields;
  if (!history.has(rev)) addChange({ rev, at: Date.now() / 1000, op: type, name, instance, host, port, state, priority, reason });
  readHistorySoon();
  schedule();
}

function upsert(key, fields) {
  let row = rows.get(key);
  const isNew = !row || row.gone;
  if (!row) rows.set(key, (row = new Row()));
  row.set(fields);
  if (isSynced) row.mark(isNew ? "added" : "changed");
  changed.add(row);
  if (row.details) drawDetails(row);
}

function remove(row, reason) {
  row.gone = reason || "gone";
  row.isDrawn = false;
  row.mark("removed");
  changed.add(row);
  if (row.details) drawDetails(row);
}

// The daemon's figures.

let samples = []; // [uptime, requests] of the last replies
let samplesEpoch = "";

/** Read the figures. Return whether the daemon answers. */
async function poll() {
  try {
    drawFigures(await ask("/v1/stats"));
    isAnswering = true;
    if (isLive) lostAt = 0;
  } catch (error) {
    // A browser with six open streams sends no other request to this host. The stream shows that the daemon is there.
    if (error.isTimeout && isLive && Date.now() - eventAt < SILENCE_MS) return true;
    isAnswering = false;
    problem = error.message;
    if (!document.hidden) lostAt ||= Date.now();
  }
  drawConnection();
  return isAnswering;
}

function drawFigures(stats) {
  if (stats.epoch !== samplesEpoch) [samples, samplesEpoch] = [[], stats.epoch];
  const own = stats.requests.stats ?? 0;
  const requests = Object.values(stats.requests).reduce((sum, count) => sum + count, 0) - own;
  samples = [...samples.slice(-5), [stats.uptime_s, requests]];
  const [first, last] = [samples[0], samples[samples.length - 1]];
  const rate = last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : 0;
  setText($("requests"), rate < 9.95 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en"));
  setText($("lag"), `${(stats.lag_s * 1000).toFixed(1)} ms`);
  setText($("uptime"), duration(stats.uptime_s));
  setText($("registry"), visible(stats.registry));
  $("registry").title = `regd ${visible(stats.version)}, pid ${stats.pid}`;
  $("figures").hidden = false;
}

function drawConnection() {
  const isAway = !isAnswering;
  const state = isAway ? "away" : isLive ? "live" : "connecting";
  const texts = { away: "Disconnected", live: "Live", connecting: isSynced ? "Reconnecting" : "Connecting" };
  $("connection").dataset.state = state;
  setText($("connection"), texts[state]);
  document.body.classList.toggle("away", isAway);
  document.title = isAway ? "regd (disconnected)" : "regd";
  $("notice").hidden = !isAway;
  const since = clock(new Date(lostAt));
  const head = isSynced ? `Disconnected since ${since}. This is the last known state.` : "Not connected yet.";
  if (isAway) setText($("notice"), `${head} ${visible(problem)}`);
}

// Filter and order, which are kept in the URL.

function readHash() {
  const values = new URLSearchParams(location.hash.slice(1));
  const column = values.get("order") ?? "name";
  order = { column: Object.hasOwn(COMPARE, column) ? column : "name", descending: values.has("descending") };
  $("filter").value = values.get("filter") ?? "";
  applyView();
}

function writeHash() {
  const values = new URLSearchParams();
  if ($("filter").value.trim()) values.set("filter", $("filter").value.trim());
  if (order.column !== "name" || order.descending) values.set("order", order.column);
  if (order.descending) values.set("descending", "");
  window.history.replaceState(null, "", `${location.pathname}#${values}`);
  applyView();
}

function applyView() {
  words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const button of document.querySelectorAll("[data-column]")) {
    const header = button.closest("th");
    if (button.dataset.column !== order.column) header.removeAttribute("aria-sort");
    else header.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
  }
  drawAll = historyIsNew = true;
  schedule();
}

function orderBy(column) {
  order = { column, descending: order.column === column && !order.descending };
  writeHash();
}

// Start.

document.querySelector("#services thead").addEventListener("click", ({ target }) => {
  if (target.dataset.column) orderBy(target.dataset.column);
});
$("services").addEventListener("click", ({ target }) => {
  const row = rowOf.get(target.closest("tr"));
  const selects = !target.closest("button") && !document.getSelection().isCollapsed; // a text, to copy it
  if (row && !target.closest("a") && !selects) toggleDetails(row);
});
$("services").addEventListener("focusin", ({ target }) => {
  const row = rowOf.get(target.closest("tr"));
  if (row) setCurrent(row);
});
$("services").addEventListener("keydown", moveFocus);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target === $("filter")) return;
  event.preventDefault();
  $("filter").focus();
});
$("filter").addEventListener("input", writeHash);
$("older").addEventListener("click", readOlder);
window.addEventListener("hashchange", readHash);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    closeStream();
    lostAt = 0;
  } else {
    openStream();
    poll();
  }
});
setInterval(tick, 1_000);
setInterval(() => source && poll(), POLL_MS); // without a stream, `retry` polls
readHash();
openStream();
poll();
