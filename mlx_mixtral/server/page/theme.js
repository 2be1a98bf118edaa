"use strict";
// Before anything is drawn: light or dark, as chosen, or as the system says.

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

function chosenTheme() {
  try {
    const chosen = localStorage.getItem("mlx-mixtral.theme");
    return chosen === "light" || chosen === "dark" ? chosen : "system";
  } catch {
    return "system"; // the browser keeps nothing
  }
}

function showTheme(chosen = chosenTheme()) {
  const isDark = chosen === "dark" || (chosen === "system" && systemIsDark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
}

function chooseTheme(chosen) {
  showTheme(chosen);
  try {
    localStorage.setItem("mlx-mixtral.theme", chosen);
  } catch {
    // Then it holds until the page is closed.
  }
}

showTheme();
systemIsDark.addEventListener("change", () => showTheme());
