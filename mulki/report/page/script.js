"use strict";
for (const [group, tabs] of [...document.querySelectorAll(".tabs")].entries()) {
  const panels = [...tabs.querySelectorAll(":scope > .panel")];
  if (panels.length < 2) continue;
  const list = document.createElement("div");
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", tabs.getAttribute("aria-label"));
  const buttons = panels.map((panel, place) => {
    const heading = panel.querySelector("h3, h4");
    const button = document.createElement("button");
    button.type = "button";
    button.id = `tab-${group}-${place}`;
    panel.id = `panel-${group}-${place}`;
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", panel.id);
    button.textContent = heading.textContent;
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", button.id);
    heading.hidden = true;
    list.append(button);
    return button;
  });
  const show = (chosen) => {
    buttons.forEach((button, place) => {
      button.setAttribute("aria-selected", String(place === chosen));
      button.tabIndex = place === chosen ? 0 : -1;
      panels[place].hidden = place !== chosen;
    });
  };
  buttons.forEach((button, place) => button.addEventListener("click", () => show(place)));
  list.addEventListener("keydown", (event) => {
    const now = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const next = {
      ArrowRight: now === last ? 0 : now + 1, ArrowLeft: now === 0 ? last : now - 1,
      Home: 0, End: last,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(next);
    buttons[next].focus();
  });
  tabs.prepend(list);
  show(0);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[place].textContent.replaceAll("\u2212", "-");
      const isNumber = head.classList.contains("number");
      const compare = (a, b) => {
        if (!isNumber) {
          const order = value(a).localeCompare(value(b), undefined, { numeric: true });
          return up ? order : -order;
        }
        const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
        // Cells without a number are the last, whichever way.
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
        return up ? x - y : y - x;
      };
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...rows);
    });
  });
}
