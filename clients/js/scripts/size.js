// Prints what the package adds to a page: all of it bundled and minified, and the same through gzip. Fails beyond the budget.

import { build } from "esbuild";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const entry = fileURLToPath(new URL("../src/index.ts", import.meta.url));
const size = async (name, gzippedMax, contents) => {
  const { outputFiles } = await build({
    ...(contents ? { stdin: { contents, resolveDir: fileURLToPath(new URL("..", import.meta.url)) } } : { entryPoints: [entry] }),
    bundle: true, minify: true, write: false, format: "esm", target: "es2022",
  });
  const code = outputFiles[0].contents;
  const gzipped = gzipSync(code, { level: 9 }).length;
  if (gzipped > gzippedMax) {
    console.error(`${name} has more than ${gzippedMax} B gzipped`);
    process.exitCode = 1;
  }
  console.log(`${name.padEnd(18)} ${String(code.length).padStart(6)} B minified ${String(gzipped).padStart(6)} B gzipped`);
};
await size("everything", 10_000);
await size("connectSession", 9_500, 'export { connectSession } from "./src/index.ts";');
await size("connectEvents", 9_500, 'export { connectEvents } from "./src/index.ts";');
await size("Agent", 6_000, 'export { Agent } from "./src/agents/index.ts";');
await size("Agents", 3_000, 'export { Agents } from "./src/agents/index.ts";');
await size("connectRoom", 11_000, 'export { connectRoom } from "./src/rooms/index.ts";');
await size("... with binary", 32_000, 'export { connectRoom } from "./src/rooms/index.ts"; export { binary } from "./src/rooms/binary.ts";');
