// Starts the page: tabs, colours, and both parts with what the server has loaded.

import { info } from "./api.js";
import { startChat } from "./chat.js";
import { startVariants } from "./diagram.js";

const part = (name) => document.getElementById(name);
const tabs = [part("tab-chat"), part("tab-variants")];

function open(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    part(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  history.replaceState(null, "", tab === tabs[1] ? "#how" : "#try");
}

function startTabs() {
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") { tabs[1 - index].focus(); tabs[1 - index].click(); }
    });
  });
  if (location.hash === "#how") tabs[1].click();
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const use = (theme) => { document.documentElement.dataset.theme = theme; };
  use(localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!localStorage.getItem("theme")) use(dark.matches ? "dark" : "light"); });
  part("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", theme);
    use(theme);
  });
}

startTheme();
try {
  const server = await info();
  part("model").textContent = server.model;
  startChat(server);
  startVariants(server, info);
  startTabs();
} catch (error) {
  part("problem").textContent = error.message;
  part("problem").hidden = false;
}
