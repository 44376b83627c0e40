// Prints what the package adds to a page: all of it bundled and minified, and the same through gzip.

import { build } from "esbuild";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const entry = fileURLToPath(new URL("../src/index.ts", import.meta.url));
const size = async (name, contents) => {
  const { outputFiles } = await build({
    ...(contents ? { stdin: { contents, resolveDir: fileURLToPath(new URL("..", import.meta.url)) } } : { entryPoints: [entry] }),
    bundle: true, minify: true, write: false, format: "esm", target: "es2022",
  });
  const code = outputFiles[0].contents;
  console.log(`${name.padEnd(18)} ${String(code.length).padStart(6)} B minified ${String(gzipSync(code, { level: 9 }).length).padStart(6)} B gzipped`);
};
await size("everything");
await size("connectSession", 'export { connectSession } from "./src/index.ts";');
await size("connectEvents", 'export { connectEvents } from "./src/index.ts";');
