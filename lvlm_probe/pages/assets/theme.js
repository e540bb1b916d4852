// Light or dark: the reader's system decides until the button is pressed; then the choice is remembered.

const remembered = (() => {
  try {
    return localStorage.getItem("lvlm_probe.theme");
  } catch {
    return null;
  }
})();
if (remembered === "light" || remembered === "dark") document.documentElement.dataset.theme = remembered;
document.getElementById("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("lvlm_probe.theme", dark ? "light" : "dark");
  } catch {
    /* a page opened from disk may not remember */
  }
});
