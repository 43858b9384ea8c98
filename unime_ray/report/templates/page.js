"use strict";
// Tabs: a button of data-tabs="x" shows the elements of data-panel="x" that have its index.
for (const bar of document.querySelectorAll("[data-tabs]")) {
  const buttons = [...bar.querySelectorAll("button")];
  const pick = (chosen) => {
    for (const button of buttons) {
      button.setAttribute("aria-selected", String(button === chosen));
      button.tabIndex = button === chosen ? 0 : -1;
    }
    for (const panel of document.querySelectorAll(`[data-panel="${bar.dataset.tabs}"]`)) {
      panel.hidden = panel.dataset.index !== chosen.dataset.show;
    }
    document.dispatchEvent(new Event("tab"));
  };
  buttons.forEach((button, index) => {
    button.tabIndex = index ? -1 : 0;
    button.addEventListener("click", () => pick(button));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(index + step + buttons.length) % buttons.length];
      next.focus();
      pick(next);
    });
  });
}
// Filters of the gallery look at the view of the judge that is shown.
const filters = document.querySelector("[data-filters]");
if (filters) {
  let current = "";
  const apply = () => {
    for (const card of document.querySelectorAll(".card")) {
      const view = card.querySelector(".view:not([hidden])");
      const matches = !current
        || (current.startsWith("shape:") ? card.dataset.shape === current.slice(6) : view && current in view.dataset);
      card.hidden = !matches || !view;
    }
  };
  filters.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    current = button.dataset.filter;
    for (const one of filters.querySelectorAll("button")) one.setAttribute("aria-pressed", String(one === button));
    apply();
  });
  document.addEventListener("tab", apply);
}
// The rail marks the section in view.
const links = new Map([...document.querySelectorAll(".rail a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("main > section")) seen.observe(section);
