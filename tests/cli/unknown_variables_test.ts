import { deepStrictEqual } from "node:assert/strict";
import { unknownVariables } from "../../lib/cli/unknown_variables.ts";

Deno.test("unknownVariables finds variables that look like options and are not, and suggests the right name", () => {
  const known = ["LB_CSI_LOG_LEVEL", "LB_CSI_CTRL_LOSS_TMO", "CSI_ENDPOINT"];
  const names = ["PATH", "LB_CSI_LOG_LEVEL", "LB_CSI_LOG_LEVLE", "LB_CSI_CTRL_LOSS_TIMEOUT", "LB_CSI_RWX", "CSI_OTHER"];

  deepStrictEqual(unknownVariables(names, known), [
    { name: "LB_CSI_CTRL_LOSS_TIMEOUT", suggestion: ', did you mean "LB_CSI_CTRL_LOSS_TMO"?' },
    { name: "LB_CSI_LOG_LEVLE", suggestion: ', did you mean "LB_CSI_LOG_LEVEL"?' },
    { name: "LB_CSI_RWX", suggestion: "" },
  ]);
});
