/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Traffic that counts: an endpoint, and clients that say what became of each connection.
 *
 *   traffic serve     NAME PORT UDP_PORT      HTTP and datagrams, both families: answers its name
 *   traffic connect   ADDRESS PORT RATE       so many connections a second, a request on each
 *   traffic keep      ADDRESS PORT COUNT MS   connections that stay, a request on each every MS
 *   traffic datagrams ADDRESS PORT RATE       a socket and a datagram, so many a second
 *   traffic refused   ADDRESS PORT RATE       connections that have to be refused
 *
 * "ready" when it begins (keep: when all are open). At SIGUSR1 one JSON line; at SIGTERM a client begins
 * nothing more (keep: a last request on each), waits for what is under way, says that line for the last time
 * and ends: connections (begun
 * and ended; keep: open), requests, failed, open (now), errors (by text), answers (by name), longest_pause_ms
 * without an answer (keep: 0), slowest_ms from a connection's begin to its answer. An answer is waited for
 * TRAFFIC_TIMEOUT_S (5).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define AT_ONCE	   256
#define LOOK_S	   0.1
#define NAMES	   64
#define NAME_BYTES 96

static const char CLOSING[] = "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
static const char STAYING[] = "GET / HTTP/1.1\r\nhost: web\r\n\r\n";

struct tally {
	char name[NAME_BYTES];
	long count;
};

static struct tally errors[NAMES], answers[NAMES];
static long connections, requests, failed, open_now;
static double longest_pause, slowest, last_answer, timeout = 5.0;

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

static void count(struct tally *tallies, const char *name)
{
	for (int i = 0; i < NAMES; i++) {
		if (!tallies[i].count)
			snprintf(tallies[i].name, NAME_BYTES, "%s", name);
		if (!strncmp(tallies[i].name, name, NAME_BYTES - 1)) {
			tallies[i].count++;
			return;
		}
	}
}

static void tell_tallies(const char *key, struct tally *tallies)
{
	printf(", \"%s\": {", key);
	for (int i = 0; i < NAMES && tallies[i].count; i++)
		printf("%s\"%s\": %ld", i ? ", " : "", tallies[i].name, tallies[i].count);
	printf("}");
}

static void tell(void)
{
	printf("{\"connections\": %ld, \"requests\": %ld, \"failed\": %ld, \"open\": %ld, "
	       "\"longest_pause_ms\": %.1f, \"slowest_ms\": %.1f",
	       connections, requests, failed, open_now, longest_pause * 1e3, slowest * 1e3);
	tell_tallies("errors", errors);
	tell_tallies("answers", answers);
	puts("}");
	fflush(stdout);
}

/* A descriptor that is readable when a signal asks for counts or for the end. */
static int signals(void)
{
	sigset_t set;
	int fd;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	if (fd < 0)
		die("signalfd");
	return fd;
}

static bool told_to_end(int fd)
{
	struct signalfd_siginfo info;
	bool end = false;

	while (read(fd, &info, sizeof(info)) == sizeof(info)) {
		if (info.ssi_signo == SIGTERM)
			end = true;
		else
			tell();
	}
	return end;
}

static void watch(int poll, int fd, void *what, unsigned int events)
{
	struct epoll_event event = { .events = events, .data.ptr = what };

	if (!epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event))
		return;
	if (errno != EEXIST || epoll_ctl(poll, EPOLL_CTL_MOD, fd, &event))
		die("epoll_ctl");
}

/* As many descriptors as there may be; fails where these are fewer. */
static void room_for(long descriptors)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) || (long)limit.rlim_max < descriptors + 16) {
		fprintf(stderr, "%ld descriptors are needed, %ld allowed\n", descriptors + 16,
			(long)limit.rlim_max);
		exit(1);
	}
}

/* The endpoint. */

static int listening(int type, int port)
{
	int one = 1, none = 0, fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	struct sockaddr_in6 at = { .sin6_family = AF_INET6, .sin6_port = htons(port) };

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &none, sizeof(none));
	if (bind(fd, (void *)&at, sizeof(at)) || (type == SOCK_STREAM && listen(fd, 4096)))
		die("listen");
	return fd;
}

static void accept_all(int poll, int listener)
{
	int fd, one = 1;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		connections++;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		watch(poll, fd, (void *)(long)fd, EPOLLIN);
	}
}

static void answer(int fd, const char *name)
{
	char buffer[4096], said[256];
	ssize_t length = recv(fd, buffer, sizeof(buffer) - 1, 0);
	int size;

	if (length <= 0) {
		if (length == 0 || errno != EAGAIN)
			close(fd);
		return;
	}
	buffer[length] = 0;
	requests++;
	size = snprintf(said, sizeof(said), "HTTP/1.1 200 OK\r\ncontent-length: %zu\r\n\r\n%s\n",
			strlen(name) + 1, name);
	if (send(fd, said, size, MSG_NOSIGNAL) != size || strstr(buffer, "connection: close"))
		close(fd);
}

static void echo(int fd, const char *name)
{
	struct sockaddr_storage from;
	socklen_t length = sizeof(from);
	char buffer[2048];

	while (recvfrom(fd, buffer, sizeof(buffer), 0, (void *)&from, &length) >= 0) {
		requests++;
		sendto(fd, name, strlen(name), 0, (void *)&from, length);
		length = sizeof(from);
	}
}

static int serve(const char *name, int port, int udp_port)
{
	int poll = epoll_create1(EPOLL_CLOEXEC), signal_fd = signals();
	int listener, datagrams;
	struct epoll_event events[256];

	room_for(1024);
	listener = listening(SOCK_STREAM, port);
	datagrams = listening(SOCK_DGRAM, udp_port);
	watch(poll, signal_fd, (void *)(long)signal_fd, EPOLLIN);
	watch(poll, listener, (void *)(long)listener, EPOLLIN);
	watch(poll, datagrams, (void *)(long)datagrams, EPOLLIN);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int found = epoll_wait(poll, events, 256, -1);

		for (int i = 0; i < found; i++) {
			int fd = (long)events[i].data.ptr;

			if (fd == signal_fd) {
				if (told_to_end(fd)) {
					tell();
					return 0;
				}
			} else if (fd == listener)
				accept_all(poll, fd);
			else if (fd == datagrams)
				echo(fd, name);
			else
				answer(fd, name);
		}
	}
}

/* The clients. */

enum kind { CONNECT, KEEP, DATAGRAMS, REFUSED };

struct client {
	enum kind kind;
	struct sockaddr_storage to;
	socklen_t to_length;
	int poll;
	long slots;
	double rate, every;
};

struct slot {
	int fd; /* -1: free */
	bool connecting, waiting;
	bool asked_last; /* keep: at the end, whether it still carries anything */
	double begun;	 /* the connection; keep: the request, or when the next is due */
	long number;
};

static void end(struct slot *slot)
{
	close(slot->fd);
	slot->fd = -1;
	open_now--;
}

static void give_up(struct client *client, struct slot *slot, const char *why)
{
	failed++;
	count(errors, why);
	if (client->kind != KEEP)
		connections++;
	end(slot);
}

static void note_pause(struct client *client, double t)
{
	if (client->kind != KEEP && t - last_answer > longest_pause)
		longest_pause = t - last_answer;
	last_answer = t;
}

static void succeeded(struct client *client, struct slot *slot, const char *name)
{
	double t = now();

	count(answers, name);
	requests++;
	note_pause(client, t);
	if (t - slot->begun > slowest)
		slowest = t - slot->begun;
	slot->waiting = false;
	if (client->kind == KEEP) {
		slot->begun = t + client->every;
		return;
	}
	connections++;
	end(slot);
}

static void ask(struct client *client, struct slot *slot)
{
	const char *request = client->kind == KEEP ? STAYING : CLOSING;

	slot->waiting = true;
	watch(client->poll, slot->fd, slot, EPOLLIN);
	if (send(slot->fd, request, strlen(request), MSG_NOSIGNAL) < 0)
		give_up(client, slot, strerror(errno));
}

static void begin(struct client *client, struct slot *slot, long number)
{
	bool stream = client->kind != DATAGRAMS;
	/* of datagrams one half from sockets that are connected, the other from sockets that are not */
	bool connected = stream || number % 2;
	int one = 1, result = 0;

	slot->fd = socket(client->to.ss_family,
			  (stream ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (slot->fd < 0)
		die("socket");
	open_now++;
	if (stream)
		setsockopt(slot->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	slot->begun = now();
	slot->number = number;
	slot->waiting = true;
	slot->connecting = stream;
	if (connected)
		result = connect(slot->fd, (void *)&client->to, client->to_length);
	if (!stream && !result) {
		watch(client->poll, slot->fd, slot, EPOLLIN);
		result = connected ? send(slot->fd, "?", 1, 0)
				   : sendto(slot->fd, "?", 1, 0, (void *)&client->to, client->to_length);
	}
	if (result < 0 && errno != EINPROGRESS) {
		if (client->kind == REFUSED && errno == ECONNREFUSED)
			succeeded(client, slot, "refused");
		else
			give_up(client, slot, strerror(errno));
	} else if (stream)
		watch(client->poll, slot->fd, slot, EPOLLOUT);
}

static void connected(struct client *client, struct slot *slot)
{
	int error = 0;
	socklen_t length = sizeof(error);

	slot->connecting = false;
	getsockopt(slot->fd, SOL_SOCKET, SO_ERROR, &error, &length);
	if (client->kind == REFUSED) {
		if (error == ECONNREFUSED)
			succeeded(client, slot, "refused");
		else
			give_up(client, slot, error ? strerror(error) : "not refused");
	} else if (error)
		give_up(client, slot, strerror(error));
	else
		ask(client, slot);
}

static void received(struct client *client, struct slot *slot)
{
	struct sockaddr_storage from;
	socklen_t length = sizeof(from);
	char buffer[4096], *body;
	ssize_t got = recvfrom(slot->fd, buffer, sizeof(buffer) - 1, 0, (void *)&from, &length);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0) {
		give_up(client, slot, got ? strerror(errno) : "closed without an answer");
		return;
	}
	buffer[got] = 0;
	if (client->kind == DATAGRAMS) {
		if (memcmp(&from, &client->to, client->to_length))
			give_up(client, slot, "an answer from another address");
		else
			succeeded(client, slot, buffer);
		return;
	}
	body = strstr(buffer, "\r\n\r\n");
	if (strncmp(buffer, "HTTP/1.1 200 ", 13) || !body || !body[4]) {
		buffer[strcspn(buffer, "\r\n")] = 0;
		give_up(client, slot, buffer);
		return;
	}
	body += 4;
	body[strcspn(body, "\r\n")] = 0;
	succeeded(client, slot, body);
}

/* How many are waited for. */
static long look_at_clock(struct client *client, struct slot *slots, bool ending)
{
	double t = now();
	long under_way = 0;

	for (long i = 0; i < client->slots; i++) {
		struct slot *slot = &slots[i];

		if (slot->fd < 0)
			continue;
		if (slot->waiting && t - slot->begun > timeout)
			give_up(client, slot,
				slot->connecting ? "no connection in time" : "no answer in time");
		else if (!slot->waiting && ending && client->kind == KEEP && !slot->asked_last) {
			if (under_way < AT_ONCE) {
				slot->asked_last = true;
				slot->begun = t;
				ask(client, slot);
			} else
				under_way++;
		} else if (!slot->waiting && t >= slot->begun && !ending) {
			slot->begun = t;
			ask(client, slot);
		}
		under_way += slot->fd >= 0 && slot->waiting;
	}
	return under_way;
}

static long begin_what_is_due(struct client *client, struct slot *slots, long begun, double since)
{
	long due = (now() - since) * client->rate - begun;

	for (long i = 0; due > 0 && i < client->slots; i++) {
		if (slots[i].fd >= 0)
			continue;
		begin(client, &slots[i], begun++);
		due--;
	}
	return begun;
}

static int run(struct client *client)
{
	struct slot *slots = calloc(client->slots, sizeof(*slots));
	struct epoll_event events[256];
	int signal_fd = signals();
	double since = now(), looked = since;
	long begun = 0, open = 0;
	bool stays = client->kind == KEEP, ready = !stays, ending = false;

	last_answer = since;
	room_for(client->slots);
	for (long i = 0; i < client->slots; i++)
		slots[i].fd = -1;
	client->poll = epoll_create1(EPOLL_CLOEXEC);
	watch(client->poll, signal_fd, NULL, EPOLLIN);
	if (ready)
		puts("ready"), fflush(stdout);
	for (;;) {
		int found = epoll_wait(client->poll, events, 256, stays ? 5 : 1);

		for (int i = 0; i < found; i++) {
			struct slot *slot = events[i].data.ptr;

			if (!slot) {
				if (told_to_end(signal_fd) && !ending) {
					ending = true;
					note_pause(client, now());
				}
			} else if (slot->fd < 0)
				continue;
			else if (slot->connecting) {
				connected(client, slot);
				if (stays && slot->fd >= 0)
					connections = ++open;
			} else
				received(client, slot);
		}
		if (now() - looked > LOOK_S || stays || ending) {
			looked = now();
			if (!look_at_clock(client, slots, ending) && ending) {
				tell();
				return 0;
			}
		}
		if (ending)
			continue;
		if (!stays) {
			/* what was not begun in time is not made up for: a client that waits does not hurry
			 */
			if ((now() - since) * client->rate - begun > client->slots)
				since = now() - begun / client->rate;
			begun = begin_what_is_due(client, slots, begun, since);
		} else if (begun < client->slots) {
			long next = begun + 64;

			while (begun < client->slots && begun < next && begun - open - failed < AT_ONCE)
				begin(client, &slots[begun], begun), begun++;
		} else if (!ready && open + failed >= client->slots) {
			ready = true;
			puts("ready"), fflush(stdout);
		}
	}
}

static void address(struct client *client, const char *host, int port)
{
	struct sockaddr_in *v4 = (void *)&client->to;
	struct sockaddr_in6 *v6 = (void *)&client->to;

	if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		client->to_length = sizeof(*v4);
	} else if (inet_pton(AF_INET6, host, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(port);
		client->to_length = sizeof(*v6);
	} else
		die("address");
}

int main(int argc, char **argv)
{
	static const char *kinds[] = { "connect", "keep", "datagrams", "refused" };
	struct client client = { .slots = AT_ONCE };
	const char *patience = getenv("TRAFFIC_TIMEOUT_S");

	if (patience)
		timeout = atof(patience);

	if (argc == 5 && !strcmp(argv[1], "serve"))
		return serve(argv[2], atoi(argv[3]), atoi(argv[4]));
	for (int kind = CONNECT; argc >= 5 && kind <= REFUSED; kind++) {
		if (strcmp(argv[1], kinds[kind]) || argc != (kind == KEEP ? 6 : 5))
			continue;
		client.kind = kind;
		address(&client, argv[2], atoi(argv[3]));
		if (kind == KEEP) {
			client.slots = atol(argv[4]);
			client.every = atof(argv[5]) / 1e3;
		} else
			client.rate = atof(argv[4]);
		return run(&client);
	}
	fprintf(stderr, "usage: traffic serve|connect|keep|datagrams|refused ...\n");
	return 2;
}
