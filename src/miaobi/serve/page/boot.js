// Before the first paint: the language and the theme that were chosen here before. Classic script: modules come too late.
(() => {
  const root = document.documentElement;
  let theme = null, language = null;
  try {
    theme = localStorage.getItem("miaobi.theme");
    language = localStorage.getItem("miaobi.language");
  } catch { /* storage is forbidden: nothing was chosen */ }
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const chinese = language ? language === "zh" : (navigator.languages ?? []).some((l) => l.startsWith("zh"));
  root.classList.add("starting");
  addEventListener("error", (event) => { // a module that did not come or is not understood
    if (event.target?.tagName === "SCRIPT") root.classList.remove("starting");
  }, true);
  root.lang = chinese ? "zh-CN" : "en";
})();
