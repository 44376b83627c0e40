import { defineConfig, type ViteUserConfig } from "vitest/config";

const config: ViteUserConfig = defineConfig({
  test: {
    projects: [
      { test: { name: "unit", include: ["test/unit/**/*.test.ts"], testTimeout: 10_000 } },
      { test: { name: "gateway", include: ["test/gateway.test.ts", "test/agents.test.ts", "test/rooms.test.ts"], testTimeout: 30_000, hookTimeout: 30_000 } },
      { test: { name: "browser", include: ["test/browser.test.ts"], testTimeout: 60_000, hookTimeout: 60_000 } },
    ],
  },
});
export default config;
