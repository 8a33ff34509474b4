"""What Chromium is asked about a page, as JavaScript expressions."""

OVERFLOW = """[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll, .unseen, svg') && e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))"""
"""What reaches out of the window, but for what scrolls within itself."""

CHARTS = """[...document.querySelectorAll('svg.chart')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('.mark')].map(mark => mark.getBoundingClientRect());
  const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const across = box => box.left >= frame.left - 1 && box.right <= frame.right + 1;
  const up = box => box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
  return {
    wide: frame.width, high: frame.height, marks: boxes.length,
    empty: boxes.filter(box => box.width < 4 || box.height < 4).length,
    outside: [...boxes, ...texts].filter(box => !(across(box) && up(box))).length,
  };
})"""
"""Each chart's size, its marks, and what of it has no extent or lies outside of it."""

CONTRAST = """(() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || element.closest('.unseen, title, desc')) continue;
    const style = getComputedStyle(element);
    const a = light(parse(element.closest('svg') ? style.fill : style.color)), b = light(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()"""
"""Every text whose contrast with what lies behind it is below 4.5 (WCAG AA)."""

INTERACTIVE = """[...document.querySelectorAll('a[href], summary, [tabindex="0"], button, input, select')]
  .filter(element => element.checkVisibility()).map(element => element.outerHTML.slice(0, 120))"""
"""What a keyboard must reach, in the page's order."""

FOCUSED = """(() => {
  const element = document.activeElement, box = element.getBoundingClientRect(), style = getComputedStyle(element);
  const across = box.right > 0 && box.left < innerWidth, up = box.bottom > 0 && box.top < innerHeight;
  return {
    what: element.outerHTML.slice(0, 120), outline: style.outlineStyle, width: parseFloat(style.outlineWidth),
    seen: box.width > 0 && box.height > 0 && across && up,
  };
})()"""
"""What has the focus, and how it shows."""

SCROLLED = """new Promise(done => {
  const element = document.activeElement;
  element.scrollLeft ? done(true) : element.addEventListener('scroll', () => done(true));
})"""
"""Whether what has the focus was scrolled sideways; waits for it."""
