/** What a call asks a simulated cluster to do. Builds the errors that the call fails with: `Cannot <action>: <problem>`. */
import { type StatusCode, StatusError } from "../../error.ts";

/** One action, named as it stands after "Cannot": `create volume "pvc-1"`. */
export class Action {
  readonly #name: string;

  constructor(name: string) {
    this.#name = name;
  }

  /** The error with which the action fails. */
  error(code: StatusCode, problem: string): StatusError {
    return new StatusError(code, `Cannot ${this.#name}: ${problem}`);
  }

  /** The INVALID_ARGUMENT error with which the action fails. */
  invalid(problem: string): StatusError {
    return this.error("INVALID_ARGUMENT", problem);
  }
}
