// The comparison: each heatmap can be saved, with the verdict that is drawn into it.
for (const button of document.querySelectorAll(".save"))
  button.addEventListener("click", () => {
    const { src } = button.closest("td").querySelector("img"),
      link = document.createElement("a");
    link.href = src;
    link.download = `${button.dataset.name}.${src.slice(11, 14) === "png" ? "png" : "jpg"}`;
    link.click();
  });
document.documentElement.dataset.ready = "true";
