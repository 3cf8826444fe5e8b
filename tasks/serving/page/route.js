// What is shown stands in the fragment of the address, which a browser never sends: captions stay out of access logs.

/** Read {view, params} from a fragment such as `#/queries?split=test`. */
export function readRoute(fragment = location.hash) {
  const [path, search = ""] = fragment.replace(/^#\/?/, "").split("?", 2);
  return { view: path || "ask", params: new URLSearchParams(search) };
}

/** Return the fragment of a view; values that are empty are left out, lists repeat their name. */
export function href(view, params = {}) {
  const search = new URLSearchParams();
  for (const [name, value] of params instanceof URLSearchParams ? params : Object.entries(params)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) search.append(name, each);
    }
  }
  const path = view === "ask" ? "" : view;
  return `#/${path}${search.size ? `?${search}` : ""}`;
}

/** Show a view: `replace` keeps the browser's way back as it is. */
export function go(view, params, { replace = false } = {}) {
  const target = href(view, params);
  if (target === location.hash) return;
  if (replace) {
    history.replaceState(null, "", target);
    dispatchEvent(new HashChangeEvent("hashchange"));
  } else {
    location.hash = target;
  }
}

/** Return the params of this place with some changed; null takes one away. */
export function changed(params, changes) {
  const result = new URLSearchParams(params);
  for (const [name, value] of Object.entries(changes)) {
    result.delete(name);
    for (const each of Array.isArray(value) ? value : [value]) if (each) result.append(name, each);
  }
  return result;
}
