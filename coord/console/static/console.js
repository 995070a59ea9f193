// Keeps #live as the server sees it. Without this file each page is complete as of when it was loaded.
"use strict";

const live = document.getElementById("live");

if (live !== null) {
  const pulse = document.getElementById("pulse");
  const announcement = document.getElementById("announcement");
  const SAY_AGAIN_MS = 5000; // A screen reader is told of changes at most so often.
  let source = null;
  let said = text(live);
  let saidAt = 0;

  function text(root) {
    const told = root.querySelector("[data-announce]");
    return told === null ? "" : told.textContent.trim().replace(/\s+/g, " ");
  }

  function show(state, words) {
    pulse.dataset.state = state;
    const span = pulse.querySelector("span");
    if (span.textContent !== words) span.textContent = words;
  }

  function received(event) {
    const page = new DOMParser().parseFromString(JSON.parse(event.data), "text/html");
    morph(live, page.body);
    show("live", "Live");
    const now = text(live);
    if (now !== said && Date.now() - saidAt > SAY_AGAIN_MS) {
      announcement.textContent = said = now;
      saidAt = Date.now();
    }
  }

  function open() {
    if (source !== null) return;
    source = new EventSource(location.href);
    source.addEventListener("page", received);
    source.addEventListener("away", (event) => show("away", JSON.parse(event.data) + "."));
    source.addEventListener("open", () => show("live", "Live"));
    source.addEventListener("error", () => {
      // A stream ends after a minute, and the browser comes back by itself; refused, it does not.
      if (source !== null && source.readyState === EventSource.CLOSED) show("away", "Not live any more.");
    });
  }

  function close() {
    if (source === null) return;
    source.close();
    source = null;
  }

  // Nobody looks at a hidden page, so nothing is read for it.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      close();
      show("static", "Paused.");
    } else {
      open();
    }
  });
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", () => document.hidden || open());
}

// Make the children of one node those of another, keeping what is equal, so that focus, selection and open details stay.
function morph(from, to) {
  const wanted = [...to.childNodes];
  wanted.forEach((next, index) => {
    const now = from.childNodes[index];
    if (now === undefined) {
      from.append(document.importNode(next, true));
    } else if (now.nodeType !== next.nodeType || now.nodeName !== next.nodeName) {
      now.replaceWith(document.importNode(next, true));
    } else if (now.nodeType === Node.ELEMENT_NODE) {
      if (!now.isEqualNode(next)) {
        attributes(now, next);
        morph(now, next);
      }
    } else if (now.nodeValue !== next.nodeValue) {
      now.nodeValue = next.nodeValue;
    }
  });
  while (from.childNodes.length > wanted.length) from.lastChild.remove();
}

function attributes(from, to) {
  for (const { name } of [...from.attributes]) {
    if (!to.hasAttribute(name) && !(name === "open" && from.nodeName === "DETAILS")) from.removeAttribute(name);
  }
  for (const { name, value } of to.attributes) {
    if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
}
