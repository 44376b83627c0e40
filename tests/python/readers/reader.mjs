// Prints the data of the events of a stream as they come, with npm's eventsource, until the gateway says that it is over.
import { EventSource } from "eventsource";

const source = new EventSource(process.argv[2]);
source.addEventListener("message", ({ data }) => console.log(data));
source.addEventListener("close", ({ data }) => {
  console.log(data);
  source.close();
});
source.addEventListener("error", ({ code, message }) => {
  console.error(code, message);
  process.exitCode = 1;
  source.close();
});
