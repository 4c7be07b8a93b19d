// The known instructions as dots: hovered, or walked over by the arrow keys, they say what they are.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 480, HEIGHT = 320, MARGIN = 22;

function draw(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

export class LatentMap {
  // `take` gets the instruction of the dot that was chosen.
  constructor(svg, caption, take) {
    this.svg = svg;
    this.caption = caption;
    this.take = take;
    this.dots = [];
    this.current = -1;
    svg.addEventListener("keydown", (event) => this.onKey(event));
    svg.addEventListener("focus", () => this.select(Math.max(this.current, 0)));
    svg.addEventListener("blur", () => this.select(-1));
    svg.addEventListener("pointerover", (event) => this.select(this.dots.indexOf(event.target)));
    svg.addEventListener("pointerleave", () => this.select(-1));
    svg.addEventListener("click", (event) => {
      const index = this.dots.indexOf(event.target);
      if (index >= 0) this.take(this.points[index].instruction);
    });
  }

  show(points) {
    this.points = points;
    const bounds = (axis) => [Math.min(...points.map((p) => p[axis])), Math.max(...points.map((p) => p[axis]))];
    this.bounds = { x: bounds("x"), y: bounds("y") };
    this.dots = points.map((point, index) => {
      const [cx, cy] = this.place(point.x, point.y);
      const dot = draw("circle", {
        class: "known", r: points.length > 400 ? 2.75 : 4, cx, cy, role: "option", id: `dot-${index}`,
        "aria-selected": "false", "aria-label": point.instruction,
      });
      return dot;
    });
    this.marks = draw("g", { "aria-hidden": "true" });
    this.svg.replaceChildren(...this.dots, this.marks);
    if (this.waiting) this.mark(...this.waiting);
  }

  // Where a point of the plane is on the picture; one outside of what is known stays at its edge.
  place(x, y) {
    const along = (value, [low, high], length) =>
      MARGIN + Math.min(1, Math.max(0, (value - low) / (high - low || 1))) * (length - 2 * MARGIN);
    return [along(x, this.bounds.x, WIDTH), HEIGHT - along(y, this.bounds.y, HEIGHT)];
  }

  // The instruction that was typed, and which known ones are near it.
  mark(x, y, near) {
    if (!this.bounds) {  // an answer may come before the map does
      this.waiting = [x, y, near];
      return;
    }
    const [cx, cy] = this.place(x, y);
    const label = draw("text", {
      x: cx > WIDTH - 60 ? cx - 12 : cx + 12, y: cy < 30 ? cy + 18 : cy - 9,
      "text-anchor": cx > WIDTH - 60 ? "end" : "start",
    });
    label.textContent = "yours";
    this.marks.replaceChildren(draw("circle", { class: "typed", r: 9, cx, cy }), label);
    const names = new Set(near);
    this.points.forEach((point, index) => this.dots[index].classList.toggle("near", names.has(point.instruction)));
  }

  clear() {
    this.waiting = null;
    this.marks?.replaceChildren();
    for (const dot of this.dots) dot.classList.remove("near");
  }

  select(index) {
    const before = this.dots[this.current];
    before?.classList.remove("current");
    before?.setAttribute("aria-selected", "false");
    if (index >= 0) this.current = index;
    const dot = this.dots[index];
    this.caption.textContent = dot ? this.points[index].instruction : "";
    if (!dot) return this.svg.removeAttribute("aria-activedescendant");
    dot.classList.add("current");
    dot.setAttribute("aria-selected", "true");
    this.svg.setAttribute("aria-activedescendant", dot.id);
  }

  onKey(event) {
    if (!this.dots.length || event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) this.select(this.nearestTowards(...step));
    else if (event.key === "PageDown") this.select(Math.min(this.current + 1, this.dots.length - 1));
    else if (event.key === "PageUp") this.select(Math.max(this.current - 1, 0));
    else if (event.key === "Home") this.select(0);
    else if (event.key === "End") this.select(this.dots.length - 1);
    else if (event.key === "Enter" || event.key === " ") this.take(this.points[Math.max(this.current, 0)].instruction);
    else return;
    event.preventDefault();
  }

  // The dot that lies nearest in a direction, those off to the side counted as farther; itself at the rim.
  nearestTowards(dx, dy) {
    const at = (index) => [Number(this.dots[index].getAttribute("cx")), Number(this.dots[index].getAttribute("cy"))];
    const from = at(this.current);
    let best = this.current, least = Infinity;
    this.dots.forEach((_, index) => {
      const to = at(index);
      const forward = (to[0] - from[0]) * dx + (to[1] - from[1]) * dy;
      const aside = Math.abs((to[0] - from[0]) * dy) + Math.abs((to[1] - from[1]) * dx);
      if (index === this.current || forward <= 0.01) return;
      const cost = forward + 2 * aside;
      if (cost < least) [best, least] = [index, cost];
    });
    return best;
  }
}
