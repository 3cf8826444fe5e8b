// The one picture that a user brought. It stays in this tab: a link can name it, and not hold it.

const STORED = "fastgda-picture";
const STORED_BYTES = 3_000_000;

let current = null;

/** The picture that was brought, {blob, url, fingerprint}, or null. */
export const upload = () => current;

/** Take a picture in place of the one before. It survives a reload of the tab where it is small enough. */
export async function bring(blob) {
  if (current) URL.revokeObjectURL(current.url);
  current = { blob, url: URL.createObjectURL(blob), fingerprint: await fingerprint(blob) };
  sessionStorage.removeItem(STORED);
  if (blob.size <= STORED_BYTES) {
    try {
      sessionStorage.setItem(STORED, JSON.stringify([blob.type, base64(new Uint8Array(await blob.arrayBuffer()))]));
    } catch {
      /* a full store: the picture is gone after a reload, and the page says so then */
    }
  }
  return current;
}

/** Take up the picture that this tab had before it was reloaded. */
export async function restore() {
  const stored = sessionStorage.getItem(STORED);
  if (!stored || current) return;
  const [type, text] = JSON.parse(stored);
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  await bring(new Blob([bytes], { type }));
}

/** The first image among files, or null. */
export const firstImage = (files) => [...(files ?? [])].find((file) => file.type.startsWith("image/")) ?? null;

/** Half of the bytes' SHA-256; without a secure connection a browser has none, and the name says no more than that. */
async function fingerprint(blob) {
  if (!crypto.subtle) return "picture";
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer()));
  return [...digest.slice(0, 8)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function base64(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += 0x8000)
    text += String.fromCharCode(...bytes.subarray(start, start + 0x8000));
  return btoa(text);
}
