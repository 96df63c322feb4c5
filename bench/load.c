/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Load for the benchmarks: an HTTP server and a closed-loop client, each one thread on epoll.
 *
 *   load serve PORT
 *   load keep  ADDRESS PORT CONNECTIONS SECONDS    requests on connections that stay
 *   load new   ADDRESS PORT CONNECTIONS SECONDS    a connection for each request, reset at its end
 *   load rate  ADDRESS PORT CONNECTIONS SECONDS RATE    so many requests a second, on connections that stay
 *
 * The client prints one JSON line: requests, failed, seconds, p50_us, p99_us. With a rate each request has
 * its time, and its latency counts from there: one that waits for the request before it has waited.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const char ANSWER[] = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
static const char REQUEST[] = "GET / HTTP/1.1\r\nhost: bench\r\n\r\n";
#define BUCKETS 200000 /* microseconds */
static uint32_t histogram[BUCKETS];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int serve(int port)
{
	int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct epoll_event event = { .events = EPOLLIN, .data.fd = listener }, events[256];
	char buffer[4096];

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (void *)&at, sizeof(at)) || listen(listener, 4096))
		die("listen");
	epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int count = epoll_wait(poll, events, 256, -1);

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;

			if (fd == listener) {
				while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					event = (struct epoll_event){ .events = EPOLLIN, .data.fd = fd };
					setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
					epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
				}
				continue;
			}
			if (recv(fd, buffer, sizeof(buffer), 0) <= 0)
				close(fd);
			else if (send(fd, ANSWER, sizeof(ANSWER) - 1, MSG_NOSIGNAL) < 0)
				close(fd);
		}
	}
}

struct slot {
	int fd;
	double begun;
	bool connecting;
};

static void begin(struct slot *slot, int poll, struct sockaddr_in *to)
{
	struct epoll_event event = { .events = EPOLLOUT, .data.ptr = slot };
	struct linger reset = { .l_onoff = 1, .l_linger = 0 };
	int one = 1;

	slot->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (slot->fd < 0)
		die("socket");
	setsockopt(slot->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	setsockopt(slot->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	slot->begun = now();
	slot->connecting = true;
	if (connect(slot->fd, (void *)to, sizeof(*to)) && errno != EINPROGRESS)
		die("connect");
	epoll_ctl(poll, EPOLL_CTL_ADD, slot->fd, &event);
}

static long percentile(long total, double share)
{
	long seen = 0;

	for (long us = 0; us < BUCKETS; us++) {
		seen += histogram[us];
		if (seen >= total * share)
			return us;
	}
	return BUCKETS;
}

static void tell(long requests, long failed, double seconds)
{
	printf("{\"requests\": %ld, \"failed\": %ld, \"seconds\": %.3f, \"p50_us\": %ld, \"p99_us\": %ld}\n",
	       requests, failed, seconds, percentile(requests, 0.5), percentile(requests, 0.99));
}

static void ask(struct slot *slot, int poll)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = slot };

	if (send(slot->fd, REQUEST, sizeof(REQUEST) - 1, MSG_NOSIGNAL) < 0)
		die("send");
	epoll_ctl(poll, EPOLL_CTL_MOD, slot->fd, &event);
}

static void answered(struct slot *slot)
{
	long us = (now() - slot->begun) * 1e6;

	histogram[us < BUCKETS ? us : BUCKETS - 1]++;
}

static int load(bool keep, struct sockaddr_in *to, int connections, double seconds)
{
	struct slot *slots = calloc(connections, sizeof(*slots));
	struct epoll_event events[256];
	int poll = epoll_create1(0);
	long requests = 0, failed = 0;
	double start = now();
	char buffer[4096];

	for (int i = 0; i < connections; i++)
		begin(&slots[i], poll, to);
	while (now() - start < seconds) {
		int count = epoll_wait(poll, events, 256, 100);

		for (int i = 0; i < count; i++) {
			struct slot *slot = events[i].data.ptr;
			if (slot->connecting) {
				slot->connecting = false;
				ask(slot, poll);
				continue;
			}
			if (recv(slot->fd, buffer, sizeof(buffer), 0) <= 0) {
				failed++;
				close(slot->fd);
				begin(slot, poll, to);
				continue;
			}
			answered(slot);
			requests++;
			if (keep) {
				slot->begun = now();
				ask(slot, poll);
			} else {
				close(slot->fd);
				begin(slot, poll, to);
			}
		}
	}
	tell(requests, failed, now() - start);
	return 0;
}

/* `begun` of a connection that is idle is when its next request is due. Never sleeps. */
static int pace(struct sockaddr_in *to, int connections, double seconds, double rate)
{
	struct slot *slots = calloc(connections, sizeof(*slots));
	bool *busy = calloc(connections, sizeof(*busy));
	struct epoll_event events[256];
	int poll = epoll_create1(0), open = 0;
	double every = connections / rate, start;
	long requests = 0, failed = 0;
	char buffer[4096];

	for (int i = 0; i < connections; i++)
		begin(&slots[i], poll, to);
	while (open < connections) {
		int count = epoll_wait(poll, events, 256, 1000);

		for (int i = 0; i < count; i++) {
			struct slot *slot = events[i].data.ptr;
			struct epoll_event event = { .events = EPOLLIN, .data.ptr = slot };

			slot->connecting = false;
			epoll_ctl(poll, EPOLL_CTL_MOD, slot->fd, &event);
			open++;
		}
	}
	start = now();
	for (int i = 0; i < connections; i++)
		slots[i].begun = start + i * every / connections;
	while (now() - start < seconds) {
		int count = epoll_wait(poll, events, 256, 0);

		for (int i = 0; i < count; i++) {
			struct slot *slot = events[i].data.ptr;

			if (recv(slot->fd, buffer, sizeof(buffer), 0) <= 0) {
				failed++;
				epoll_ctl(poll, EPOLL_CTL_DEL, slot->fd, NULL);
				continue;
			}
			answered(slot);
			requests++;
			slot->begun += every;
			busy[slot - slots] = false;
		}
		for (int i = 0; i < connections; i++) {
			if (!busy[i] && slots[i].begun <= now()) {
				busy[i] = true;
				if (send(slots[i].fd, REQUEST, sizeof(REQUEST) - 1, MSG_NOSIGNAL) < 0)
					die("send");
			}
		}
	}
	tell(requests, failed, now() - start);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };

	if (argc == 3 && !strcmp(argv[1], "serve"))
		return serve(atoi(argv[2]));
	if (argc < 6 || argc > 7 || inet_pton(AF_INET, argv[2], &to.sin_addr) != 1) {
		fprintf(stderr, "usage: load serve PORT | load keep|new|rate ADDRESS PORT CONNECTIONS "
				"SECONDS [RATE]\n");
		return 2;
	}
	to.sin_port = htons(atoi(argv[3]));
	if (argc == 7)
		return pace(&to, atoi(argv[4]), atof(argv[5]), atof(argv[6]));
	return load(!strcmp(argv[1], "keep"), &to, atoi(argv[4]), atof(argv[5]));
}
