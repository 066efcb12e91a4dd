// The search of the site in a page that was opened from a folder: browsers start no
// worker from a file: address, so its program runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) =>
        setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      inside.importScripts = (...urls) => Promise.all(urls.map(load));
      const ready = load(url);
      this.postMessage = (data) =>
        ready.then(() =>
          inside.dispatchEvent(new MessageEvent("message", { data })));

      function load(source) {
        return new Promise((resolve, reject) => {
          const script = inside.document.createElement("script");
          script.onload = resolve;
          script.onerror = reject;
          script.src = source;
          inside.document.body.append(script);
        });
      }
    }
  };
}
