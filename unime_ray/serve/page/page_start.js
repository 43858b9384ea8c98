
// --- controls, keys, start -----------------------------------------------------------------------------------------

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value ?? "";

function segments(name, options, value) {
  for (const [each, label] of options) {
    const input = make("input", { type: "radio", name, value: each });
    input.checked = String(each) === String(value);
    input.addEventListener("change", () => search());
    $(name).append(make("label", {}, input, make("span", {}, label)));
  }
}

function showTasks() {
  const kind = state.image ? ($("text").value.trim() ? "both" : "image") : "text";
  const tasks = (state.info?.tasks || []).filter((task) => task.query === kind && task.instruction);
  const signature = tasks.map((task) => task.name).join();
  $("task-label").hidden = !tasks.length;
  if ($("task").dataset.signature === signature) return;
  $("task").dataset.signature = signature;
  $("task").replaceChildren(
    ...tasks.map((task) => make("option", { value: task.name, title: task.instruction }, task.instruction)),
    make("option", { value: tasks.length ? "none" : "" }, "my words alone"));
}

function showInfo(info) {
  state.info = info;
  const models = info.embedder + (info.reranker ? ` + ${info.reranker}` : "");
  $("status").replaceChildren(`${info.items.toLocaleString("en")} items`, make("span", { class: "models" }, ` · ${models}`));
  if (!info.reranker) {
    $("rerank").checked = false;
    $("rerank").disabled = true;
    $("rerank-label").classList.add("off");
    $("rerank-label").title = "This server has no reranker";
  }
  $("group").replaceChildren(make("option", { value: "" }, "everything"), ...info.groups.map((group) =>
    make("option", { value: JSON.stringify([group.dataset, group.split]) }, `${group.dataset} / ${group.split} (${group.items.toLocaleString("en")})`)));
  $("group-label").hidden = info.groups.length < 2;
  showTasks();
}

async function start() {
  // Nothing asked yet: a few items to start from, drawn from all over the index.
  if (!state.info) return;
  state.request++;
  $("results").classList.remove("busy");
  $("summary").hidden = true;
  $("training").hidden = true;
  notice("");
  try {
    const total = state.info.items;
    const cursor = Math.floor(Math.random() * Math.max(1, total - 12));
    const page = await (await api(`/v1/items?limit=12&cursor=${cursor}`)).json();
    $("intro").hidden = !page.items.length;
    if (!total) notice("The index is empty.");
    state.results = page.items;
    render(page.items.map((item) => card(item, null)));
  } catch (error) { notice(sentence(error.message)); }
}

function rememberQuery(body) {
  // A picture is too long for an address; words, k and the switch are kept.
  const parts = new URLSearchParams({ q: body.text || "", k: body.k, rerank: body.rerank ? 1 : 0 });
  const hash = body.image ? "#" : `#${parts}`;
  if (location.hash !== hash) history.pushState(null, "", hash);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("q")) return false;
  $("text").value = parts.get("q");
  const k = document.querySelector(`input[name="k"][value="${CSS.escape(parts.get("k") || "")}"]`);
  if (k) k.checked = true;
  if (!$("rerank").disabled) $("rerank").checked = parts.get("rerank") !== "0";
  setPicture(null);
  return Boolean(parts.get("q"));
}

function walk(key) {
  const cards = [...$("results").querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  if (!cards.length) return false;
  if (at < 0) { if (key !== "ArrowDown") return false; focusCard(cards, 0); return true; }
  const columns = cards.filter((node) => node.getBoundingClientRect().top === cards[0].getBoundingClientRect().top).length;
  const to = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (to < 0 && key === "ArrowUp") $("text").focus(); else focusCard(cards, Math.min(Math.max(to, 0), cards.length - 1));
  return true;
}

function focusCard(cards, at) {
  cards.forEach((node, place) => node.setAttribute("tabindex", place === at ? "0" : "-1"));
  cards[at].focus();
}

function onKey(event) {
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = document.activeElement === $("text");
  const inControl = document.activeElement?.matches("select, input[type=radio]");
  if (event.key === "Escape") {
    if (typing) { $("text").value = ""; setPicture(null); history.pushState(null, "", "#"); start(); } else $("text").focus();
  } else if (event.key.startsWith("Arrow") && !inControl && (!typing || event.key === "ArrowDown")) {
    if (walk(event.key)) event.preventDefault();
  } else if ((event.key === "Enter" || event.key === " ") && document.activeElement?.matches(".card")) {
    event.preventDefault();
    document.activeElement.click();
  } else if (!typing && event.key === "/") { event.preventDefault(); $("text").focus(); $("text").select();
  } else if (!typing && event.key === "r" && !$("rerank").disabled) { $("rerank").click();
  } else if (!typing && event.key === "?") $("help").showModal();
}

function setTheme(theme) { document.documentElement.dataset.theme = theme; }

function listen() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  $("text").addEventListener("input", showTasks);
  for (const name of ["rerank", "task", "group"]) $(name).addEventListener("change", () => search());
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => { takePicture($("file").files[0]); $("file").value = ""; });
  $("thumb-remove").addEventListener("click", () => { setPicture(null); $("text").focus(); search(); });
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", next);
    setTheme(next);
  });
  addEventListener("keydown", onKey);
  addEventListener("popstate", () => { if (recall()) search({ remember: false }); else { $("text").value = ""; setPicture(null); start(); } });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith("image/"));
    if (file) { event.preventDefault(); takePicture(file); }
  });
  let depth = 0;
  const over = (on) => $("drop").classList.toggle("on", on);
  addEventListener("dragenter", (event) => { event.preventDefault(); depth++; over(true); });
  addEventListener("dragleave", () => { if (--depth <= 0) { depth = 0; over(false); } });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => { event.preventDefault(); depth = 0; over(false); takePicture(event.dataTransfer.files[0]); });
}

async function infoWhenThere() {
  // A stage of the server may be starting again: the page works without and goes on asking.
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15000)) {
    try { return await (await api("/v1/info")).json(); } catch (error) {
      if (!state.request) notice(sentence(error.message));
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

function limitK(info) {
  for (const input of document.querySelectorAll('input[name="k"]')) {
    if (Number(input.value) > info.max_k) input.closest("label").remove();
    else if (!state.request && Number(input.value) === info.k) input.checked = true;
  }
  const left = [...document.querySelectorAll('input[name="k"]')];
  if (!chosen("k") && left.length) left.at(-1).checked = true;
}

async function main() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!localStorage.getItem("theme")) setTheme(dark.matches ? "dark" : "light"); });
  listen();
  segments("k", KS.map((k) => [k, String(k)]), 12);
  segments("kind", [["", "all"], ["image", "pictures"], ["text", "texts"]], "");
  $("text").focus({ preventScroll: true });
  const info = await infoWhenThere();
  limitK(info);
  showInfo(info);
  if (state.request) return; // somebody has asked meanwhile
  if (recall()) search({ remember: false }); else start();
}

main();
