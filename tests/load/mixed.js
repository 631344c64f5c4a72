// Requests arrive at fixed rates, whether or not earlier ones are answered, so that a slow server cannot slow the
// load down and look fast. Each operation has a trend of its own and a counter of what went wrong.

import { sleep } from "k6";
import exec from "k6/execution";
import http from "k6/http";
import { Counter, Trend } from "k6/metrics";
import ws from "k6/ws";

const API = __ENV.API;
const SECONDS = Number(__ENV.SECONDS);
const ROOMS = JSON.parse(open(__ENV.ROOMS));
const OPERATIONS = ["book", "poll", "send", "history", "socket_open", "socket_ack", "socket_delivery"];

const took = Object.fromEntries(OPERATIONS.map((name) => [name, new Trend(name, true)]));
const failed = Object.fromEntries(OPERATIONS.map((name) => [name, new Counter(`${name}_errors`)]));

function arriving(name, perSecond) {
  return {
    executor: "constant-arrival-rate",
    exec: name,
    rate: perSecond,
    timeUnit: "1s",
    startTime: "2s", // once the sockets are open
    duration: `${SECONDS}s`,
    preAllocatedVUs: 16,
    maxVUs: 64,
  };
}

export const options = {
  scenarios: {
    book: arriving("book", 5),
    poll: arriving("poll", 40),
    send: arriving("send", 60),
    history: arriving("history", 20),
    sockets: { executor: "per-vu-iterations", exec: "sockets", vus: 20, iterations: 1, maxDuration: `${SECONDS + 10}s` },
  },
  summaryTrendStats: ["count", "p(50)", "p(95)", "p(99)"],
  systemTags: [],
};

const turn = () => exec.scenario.iterationInTest;
const room = (number) => ROOMS[number % ROOMS.length];
const unique = () => `${exec.vu.idInTest}-${Date.now()}-${Math.random()}`;

function request(operation, method, path, token, expected, body) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  const answer = http.request(method, `${API}/api/v1${path}`, body ? JSON.stringify(body) : null, { headers });
  note(operation, answer.status === expected, answer.timings.duration, `${answer.status} ${answer.body}`);
}

function note(operation, well, milliseconds, otherwise) {
  if (well) {
    took[operation].add(milliseconds);
  } else {
    failed[operation].add(1);
    console.error(`${operation}: ${otherwise}`);
  }
}

export function book() {
  // Each half hour of each doctor once, from tomorrow on.
  const [here, slot] = [room(turn()), Math.floor(turn() / ROOMS.length)];
  const starts_at = new Date((Math.ceil(Date.now() / 86400000) + 1) * 86400000 + slot * 1800000).toISOString();
  request("book", "POST", "/appointments", here.patient, 201, { doctor_id: here.doctor_id, modality: "text", starts_at });
}

export function poll() {
  const here = room(turn());
  request("poll", "GET", `/appointments/${here.appointment_id}/session`, here.patient, 200);
}

export function send() {
  const here = room(turn());
  const message = { client_message_id: unique(), body: "Should I take them in the morning instead?" };
  request("send", "POST", `/chat/${here.context}/messages`, here.patient, 201, message);
}

export function history() {
  const here = room(turn());
  request("history", "GET", `/chat/${here.context}/messages?limit=20`, here.doctor, 200);
}

// A doctor who follows a conversation and writes every two seconds. Each message is acknowledged, and comes back
// as everyone in the conversation gets it.
export function sockets() {
  const here = room(exec.vu.idInTest);
  const headers = { Authorization: `Bearer ${here.doctor}`, "Sec-WebSocket-Protocol": "sessiongate.v1" };
  const url = `${API.replace("http", "ws")}/api/v1/chat/${here.context}/socket`;
  const sent = {};
  sleep(exec.vu.idInTest * 0.05); // People do not arrive at the same instant.
  const began = Date.now();

  const answer = ws.connect(url, { headers }, (socket) => {
    const write = () => {
      const id = unique();
      sent[id] = Date.now();
      socket.send(JSON.stringify({ type: "message", client_message_id: id, body: "In the morning, please." }));
    };

    socket.on("open", () => socket.send(JSON.stringify({ type: "hello" })));
    socket.on("error", (error) => note("socket_open", false, 0, error.error()));
    socket.on("message", (text) => {
      const frame = JSON.parse(text);
      if (frame.type === "caught_up") {
        note("socket_open", true, Date.now() - began);
        write();
        socket.setInterval(() => began + (SECONDS - 1) * 1000 > Date.now() && write(), 2000);
        socket.setTimeout(() => socket.close(), SECONDS * 1000);
      } else if (frame.type === "ack") {
        note("socket_ack", true, Date.now() - sent[frame.client_message_id]);
      } else if (frame.type === "message" && frame.message.client_message_id in sent) {
        note("socket_delivery", true, Date.now() - sent[frame.message.client_message_id]);
      } else if (frame.type === "refused") {
        note("socket_ack", false, 0, text);
      }
    });
  });
  if (answer.status !== 101) {
    note("socket_open", false, 0, answer.body);
  }
}

export function handleSummary(data) {
  const found = {};
  for (const name of OPERATIONS) {
    const values = data.metrics[name] ? data.metrics[name].values : { count: 0 };
    const errors = data.metrics[`${name}_errors`];
    found[name] = { ...values, errors: errors ? errors.values.count : 0 };
  }
  return { stdout: JSON.stringify(found) };
}
