"use strict";
// The search page: one query (words, a picture, or both), one request, a grid. No framework and no build step.

const $ = (id) => document.getElementById(id);
const state = { image: null, info: null, results: [], request: 0, key: sessionStorage.getItem("key") || "" };
const KS = [6, 12, 24, 48];
const MAX_SIDE = 1280;
const still = matchMedia("(prefers-reduced-motion: reduce)");

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name === "class") node.className = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// --- asking the server ---------------------------------------------------------------------------------------------

async function api(path, body) {
  const headers = state.key ? { authorization: `Bearer ${state.key}` } : {};
  const options = body ? { method: "POST", headers: { ...headers, "content-type": "application/json" }, body: JSON.stringify(body) } : { headers };
  const response = await fetch(path, options);
  if (response.status === 401) { await askForKey(); return api(path, body); }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message || `the server answered ${response.status}`);
  }
  return response;
}

let asking = null;
function askForKey() {
  asking ||= new Promise((resolve) => {
    $("key-dialog").showModal();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      state.key = $("key").value.trim();
      sessionStorage.setItem("key", state.key);
      $("key-dialog").close();
      asking = null;
      resolve();
    };
  });
  return asking;
}

async function showPicture(image, url) {
  // With a key the picture cannot be addressed directly: an <img> sends no headers.
  if (!state.key) { image.src = url; return; }
  const blob = await (await api(url)).blob();
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
}

// --- the query -----------------------------------------------------------------------------------------------------

async function takePicture(file) {
  if (!file || !file.type.startsWith("image/")) { notice("That is not a picture."); return; }
  try { setPicture(await shrunk(file)); } catch { notice("This picture could not be read."); return; }
  search();
}

async function shrunk(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && blob.size < 2_000_000) return asDataUrl(blob);
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const draw = canvas.getContext("2d");
  draw.fillStyle = "#fff";
  draw.fillRect(0, 0, canvas.width, canvas.height);
  draw.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function asDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function setPicture(url) {
  state.image = url;
  $("thumb").hidden = !url;
  if (url) $("thumb-image").src = url; else $("thumb-image").removeAttribute("src");
  $("text").placeholder = url ? "Add words, if you like" : "Describe it, or drop a picture";
  showTasks();
}

async function searchWith(hit) {
  if (hit.image_url) {
    $("text").value = "";
    setPicture(await asDataUrl(await (await api(hit.image_url)).blob()));
  } else {
    setPicture(null);
    $("text").value = hit.caption || hit.text;
  }
  scrollTo({ top: 0, behavior: still.matches ? "auto" : "smooth" });
  search();
}

function query() {
  const [dataset, split] = $("group").value ? JSON.parse($("group").value) : [null, null];
  const kind = chosen("kind");
  const filter = { ...(dataset && { dataset, split }), ...(kind && { kind }) };
  const text = $("text").value.trim();
  return {
    ...(text && { text }), ...(state.image && { image: state.image }),
    k: Number(chosen("k")) || 12, rerank: $("rerank").checked, filter,
    ...($("task").value === "none" ? { instruction: "" } : $("task").value && { task: $("task").value }),
  };
}

async function search({ remember = true } = {}) {
  const body = query();
  if (!body.text && !body.image) { start(); return; }
  const number = ++state.request;
  $("results").classList.add("busy");
  notice("");
  try {
    const answer = await (await api("/v1/search", body)).json();
    if (number !== state.request) return;
    show(answer);
    if (remember) rememberQuery(body);
  } catch (error) {
    if (number !== state.request) return;
    notice(sentence(error.message));
  } finally {
    if (number === state.request) $("results").classList.remove("busy");
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// --- the answer ----------------------------------------------------------------------------------------------------

function show(answer) {
  state.results = answer.results;
  $("intro").hidden = true;
  $("summary").hidden = false;
  const total = Math.round(answer.timings_ms.total);
  $("count").replaceChildren(make("b", {}, String(answer.results.length)), ` of ${state.info ? state.info.items.toLocaleString("en") : "the"} items in `, make("b", {}, `${total} ms`));
  showTimes(answer.timings_ms);
  if (answer.degraded) notice({ late: "The reranker took too long", overloaded: "The reranker is busy", down: "The reranker is not available", too_long: "These results do not fit into the reranker's context" }[answer.degraded_reason] + ": this is the order of retrieval alone.");
  else if (!answer.results.length) notice("Nothing in the index passes this filter.");
  render(answer.results.map((hit) => card(hit, answer)));
  showNegatives(answer).catch((error) => notice(sentence(error.message)));
}

async function showNegatives(answer) {
  // Only a query of the training data has any: the very words under the very task.
  $("training").hidden = true;
  if (!state.info?.hard_negatives) return;
  const number = state.request;
  const mined = await (await api(`/v1/negatives/${answer.query_id}`)).json();
  if (number !== state.request || !mined.positives.length) return;
  const golds = mined.positives.map((item) => item.caption || "a picture").join(", ");
  const yes = mined.positives.map((item) => item.judge_score.toFixed(2)).join(", ");
  $("training-note").textContent = `Chosen by the judge “${mined.judge}”. Its score of the positive (${golds}): ${yes}.`;
  $("negatives").replaceChildren(...mined.negatives.map(negativeCard));
  $("training").hidden = false;
}

function negativeCard(hit) {
  const scores = make("dl", { class: "scores" }, ...meter("judge", hit.judge_score, hit.judge_score.toFixed(2), " b", "The judge's probability of Yes"),
    ...meter("match", Math.max(0, hit.similarity ?? 0), (hit.similarity ?? 0).toFixed(3), "", "Cosine similarity when it was mined"));
  const words = hit.image_url && hit.caption ? make("p", { class: "caption", title: hit.caption }, hit.caption) : null;
  const why = make("span", { class: "move", title: "Why it was chosen" }, (hit.reason || "").replaceAll("_", " "));
  const box = make("article", { class: "card", tabindex: "-1", role: "button", "aria-label": `Hard negative: ${hit.caption || "picture"}. Search with it` },
    plate(hit), make("div", { class: "facts" }, make("div", { class: "head" }, why), words, scores));
  box.addEventListener("click", () => searchWith(hit).catch((error) => notice(sentence(error.message))));
  return make("li", {}, box);
}

function showTimes(times) {
  const parts = ["encode", "retrieve", "rerank"].filter((name) => times[name] > 0);
  const other = Math.max(0, times.total - parts.reduce((sum, name) => sum + times[name], 0));
  const all = [...parts.map((name) => [name, times[name]]), ["other", other]].filter(([, ms]) => ms >= 0.5);
  $("times").replaceChildren(...all.map(([name, ms]) => {
    const bar = make("i", { class: name });
    bar.style.flex = `${ms} 0 0`;
    return bar;
  }));
  $("times").setAttribute("aria-label", all.map(([name, ms]) => `${name} ${Math.round(ms)} ms`).join(", "));
  $("legend").replaceChildren(...all.map(([name, ms]) => make("li", { class: name }, `${name} ${ms < 10 ? ms.toFixed(1) : Math.round(ms)}`)));
}

function card(hit, answer) {
  const item = make("li", { "data-id": hit.id });
  const box = make("article", { class: "card", tabindex: "-1", role: "button", "aria-label": described(hit, answer) });
  box.append(plate(hit), answer ? facts(hit, answer) : caption(hit), make("span", { class: "like", "aria-hidden": "true" }, "Search with this"));
  box.addEventListener("click", () => searchWith(hit).catch((error) => notice(sentence(error.message))));
  item.append(box);
  return item;
}

function described(hit, answer) {
  const what = hit.caption || (hit.image_url ? "picture" : "item");
  if (!answer) return `Search with ${what}`;
  const moved = answer.reranked && hit.rank !== hit.retrieval_rank ? `, ${hit.retrieval_rank} by similarity` : "";
  return `${hit.rank}${moved}: ${what}. Search with it`;
}

function plate(hit) {
  if (!hit.image_url) return make("div", { class: "plate words" }, make("p", {}, hit.caption || hit.text || ""));
  const image = make("img", { alt: hit.caption || "", loading: "lazy", decoding: "async" });
  const frame = make("div", { class: "plate" }, image);
  image.addEventListener("load", () => frame.classList.toggle("photo", Math.max(image.naturalWidth, image.naturalHeight) > 200));
  showPicture(image, `${hit.image_url}&size=384`).catch(() => frame.classList.add("words"));
  return frame;
}

function caption(hit) {
  return hit.image_url && hit.caption ? make("div", { class: "facts" }, make("p", { class: "caption" }, hit.caption)) : "";
}

function facts(hit, answer) {
  const seen = hit.rerank_score !== null;
  const steps = hit.retrieval_rank - hit.rank;
  const label = steps > 0 ? `▲ ${steps}` : steps < 0 ? `▼ ${-steps}` : "=";
  const title = `${ordinal(hit.retrieval_rank)} by similarity, ${ordinal(hit.rank)} after reranking`;
  const badge = answer.reranked ? make("span", { class: `move${steps > 0 ? " up" : ""}`, title }, label) : null;
  const similarities = answer.results.map((other) => other.similarity);
  const [low, high] = [Math.min(...similarities), Math.max(...similarities)];
  const share = high > low ? (hit.similarity - low) / (high - low) : 1;
  const best = Math.max(...answer.results.map((other) => other.rerank_score || 0), 1e-9);
  const scores = make("dl", { class: "scores" }, ...meter("match", share, hit.similarity.toFixed(3), "", "Cosine similarity; the bar spans this page's range"));
  if (answer.reranked) scores.append(...meter("rerank", seen ? hit.rerank_score / best : 0, seen ? `${(hit.rerank_score * 100).toFixed(hit.rerank_score < 0.1 ? 1 : 0)}%` : "–", " b", seen ? "Share of the reranker's vote" : "The reranker did not see this one"));
  return make("div", { class: "facts" },
    make("div", { class: "head" }, make("span", { class: "rank" }, String(hit.rank)), badge),
    hit.image_url && hit.caption ? make("p", { class: "caption", title: hit.caption }, hit.caption) : null, scores);
}

function meter(name, share, value, kind, title) {
  const fill = make("i");
  fill.style.width = `${Math.max(2, Math.round(share * 100))}%`;
  return [make("dt", { title }, name), make("dd", { class: `meter${kind}`, "aria-hidden": "true" }, fill), make("dd", {}, value)];
}

function ordinal(n) {
  const ending = n % 100 > 10 && n % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[n % 10] || "th";
  return n + ending;
}

function render(cards) {
  // Cards that stay glide to their new places, so that the reranker's moves can be seen.
  const before = new Map([...$("results").children].map((node) => [node.dataset.id, node.getBoundingClientRect()]));
  $("results").replaceChildren(...cards);
  cards[0]?.firstChild.setAttribute("tabindex", "0");
  if (still.matches) return;
  for (const node of cards) {
    const old = before.get(node.dataset.id);
    const now = node.getBoundingClientRect();
    if (old && (old.x !== now.x || old.y !== now.y)) node.animate([{ transform: `translate(${old.x - now.x}px, ${old.y - now.y}px)` }, { transform: "none" }], { duration: 420, easing: "cubic-bezier(.2,.8,.2,1)" });
    else if (!old) node.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 220 });
  }
}

function notice(text) { $("notice").textContent = text; $("notice").hidden = !text; }
