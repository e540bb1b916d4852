// A click on a button is an event with what the button holds in its data attributes.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && element.contains(button)) trigger("click", { ...button.dataset });
});
