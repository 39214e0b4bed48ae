// Reads server-sent events. EventSource cannot send POST requests.

/** Yields {name, data} for each event. `data` is parsed as JSON. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text = (text + value).replaceAll("\r\n", "\n");
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) yield parse(part);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function parse(part) {
  const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s, 2)));
  return { name: fields.event, data: JSON.parse(fields.data) };
}
