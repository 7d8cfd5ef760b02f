/** A failure that the person who builds can act on: only its message is printed, without a stack. */
export class BuildError extends Error {}

/** Runs a program's main function; prints the message of a BuildError and exits with status 1. */
export async function exitOnBuildError(main: () => Promise<void>): Promise<void> {
  try {
    await main();
  } catch (error) {
    if (!(error instanceof BuildError)) throw error;
    console.error(error.message);
    Deno.exit(1);
  }
}
